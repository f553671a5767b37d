# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> a running engine: model, weights, optimizer, schedule, DeepSpeed."""

from __future__ import annotations

import os

import torch

from megatron.checkpoint.build import Source, Take, spec_for
from megatron.checkpoint.neox_store import load_module
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.distributed import choose_device, rendezvous_from, seed_everything, start
from megatron.engine.engine import TrainEngine
from megatron.engine.pipeline import LossOfStep, PipelinePath
from megatron.engine.sequential import SequentialPath
from megatron.engine.timers import Timers
from megatron.errors import BackendError, ConfigError
from megatron.log import get_logger
from megatron.model.attention.backends import refuses
from megatron.model.build import build_pipeline, build_transformer
from megatron.model.spec import BackendName, ModelSpec
from megatron.mpu.groups import Groups
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.deepspeed import deepspeed_config
from megatron.optim.build import build_optimizer, build_scheduler

log = get_logger(__name__)


def join_job(args: NeoXArgs) -> tuple[Groups, torch.device]:
    """Make this process a rank of the job.

    Raises ConfigError when the job's size is not what the configuration was resolved for.
    """
    runtime = args.runtime
    place = rendezvous_from(os.environ, slurm=runtime.deepspeed_slurm, mpi=runtime.deepspeed_mpi)
    if place.world_size != runtime.global_num_gpus:
        raise ConfigError(
            f"{place.world_size} processes were started, but the configuration is for {runtime.global_num_gpus}",
            where="global_num_gpus",
            mend=f"set global_num_gpus to {place.world_size}, or start {runtime.global_num_gpus} processes",
        )
    if runtime.model_parallel_size > 1 or runtime.pipe_parallel_size > 1:
        raise ConfigError(
            f"model_parallel_size {runtime.model_parallel_size}, pipe_parallel_size {runtime.pipe_parallel_size}: not built yet",
            where="model_parallel_size, pipe_parallel_size",
            mend="use model_parallel_size 1 and pipe_parallel_size 0 or 1; data parallelism and ZeRO are available",
        )
    device = choose_device(place.local_rank)
    if device.type == "cpu" and args.model.precision == "fp16":
        raise BackendError("fp16 does not run on a CPU", where="precision", mend="use bfloat16 or fp32")
    groups = start(place, device)
    seed_everything(args.run.seed + groups.dp.rank)
    return groups, device


def build_engine(args: NeoXArgs, source: Source, groups: Groups, device: torch.device) -> tuple[TrainEngine, ModelSpec]:
    """The engine, with the weights of `source` in it, and what its model is."""
    spec = spec_for(args, source.folder)
    pipelined = args.runtime.pipe_parallel_size >= 1
    loss_of_step = LossOfStep()
    model: torch.nn.Module
    if pipelined:
        model = build_pipeline(args, spec, loss_fn=loss_of_step)
    else:
        model = build_transformer(args, spec, groups=groups)
    model = model.to(device)
    if source.directory is not None and source.take in (Take.WEIGHTS, Take.WEIGHTS_AND_POSITION):
        report = load_module(source.directory, source.tag, model)
        log.info("  successfully loaded %s (%s parameters)", report.path, f"{report.parameters:,}")
    count = sum(p.numel() for p in model.parameters())
    log.info(" > number of parameters on model parallel rank %d: %d", groups.tp.rank, count)
    log.info(" > total params: %s", f"{count:,}")
    say_what_serves_flash(spec, device, next(model.parameters()).dtype)
    optimizer = build_optimizer(args, model, device)
    runner = Runner(
        model, optimizer, build_scheduler(args, optimizer), deepspeed_config(args), groups, save_optimizer=not args.checkpoint.no_save_optim
    )
    timers = Timers(device, enabled=args.logs.wall_clock_breakdown)
    path = PipelinePath(runner, loss_of_step, device, timers) if pipelined else SequentialPath(runner, device, timers)
    return TrainEngine(runner, path, device, timers), spec


def say_what_serves_flash(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    """One line where `flash` in attention_config is served without the flash-attn package."""
    asked = next((block.attention for block in spec.blocks if block.attention.flash), None)
    if asked is None or asked.backend is not BackendName.AUTO:
        return
    reason = refuses(BackendName.FLASH_ATTN, asked, device, dtype)
    if reason is not None:
        log.info("attention type flash is exact fused attention by PyTorch here: %s", reason)
