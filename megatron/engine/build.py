# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> a running engine (model, weights, optimizer, schedule, DeepSpeed), and what writes its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.build import STARTED_FROM, CheckpointSource, Weights, compared_args, opened
from megatron.checkpoint.formats.neox_files import copy_weights
from megatron.deepspeed_private import entries_of
from megatron.engine.base import Engine
from megatron.engine.checkpointer import Checkpointer
from megatron.engine.deepspeed_mpu import Partitioning, counted_here, mark_split
from megatron.engine.deepspeed_runner import Runner
from megatron.engine.distributed import choose_device, seed_everything, start
from megatron.engine.engine import TrainEngine
from megatron.engine.micro_batches import LossOfStep, PipelinePath, SequentialPath, Timers
from megatron.engine.restore import forward_pass
from megatron.errors import BackendError, ConfigError, required
from megatron.launch.environment import place_from
from megatron.log import get_logger
from megatron.model.attention.backends import refuses
from megatron.model.build import build_pipeline, build_transformer, parameter_dtype
from megatron.model.slots import context_plan
from megatron.model.spec import AttentionSpec, BackendName, ModelSpec
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Groups
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.deepspeed import deepspeed_config
from megatron.optim.build import build_optimizer, build_scheduler
from megatron.provenance import code_version
from megatron.secrets import redact_mapping

log = get_logger(__name__)


def join_job(args: NeoXArgs) -> tuple[Groups, torch.device]:
    """Make this process a rank of the job.

    Raises ConfigError when the job's size is not what the configuration was resolved for.
    """
    runtime = args.runtime
    place = place_from(os.environ, slurm=runtime.deepspeed_slurm, mpi=runtime.deepspeed_mpi)
    if place.world_size != runtime.global_num_gpus:
        raise ConfigError(
            f"{place.world_size} processes were started, but the configuration is for {runtime.global_num_gpus}",
            where="global_num_gpus",
            fix=f"set global_num_gpus to {place.world_size}, or start {runtime.global_num_gpus} processes",
        )
    device = choose_device(place.local_rank)
    if device.type == "cpu" and args.model.precision == "fp16":
        raise BackendError("fp16 does not run on a CPU", where="precision", fix="use bfloat16 or fp32")
    if device.type == "cpu" and ((args.optim.zero_optimization or {}).get("offload_optimizer") or {}).get("super_offload"):
        where = "zero_optimization.offload_optimizer.super_offload"
        raise BackendError("SuperOffload needs CUDA", where=where, fix="remove super_offload: on a CPU there is nothing to offload to")
    # The watch names the rank that the others wait for; a collective that gives up before it does knows none.
    patience = max(PATIENCE_MINUTES, 4 * args.logs.hang_timeout_in_mins)
    sizes = {"pipe": runtime.pipe_parallel_size, "tensor": runtime.model_parallel_size, "context": runtime.context_parallel_size}
    groups = start(place, device, sequence=runtime.sequence_parallel, timeout_minutes=patience, **sizes)
    # Tensor ranks draw alike (mpu/random.py); replicas and stages do not.
    seed_everything(args.run.seed + groups.replicas.rank + STAGE_SEEDS * groups.pp.rank)
    return groups, device


PATIENCE_MINUTES = 30.0
"""A collective that lasts longer fails, at least; see `hang_timeout_in_mins`."""

STAGE_SEEDS = 100_003
"""Distance between the seeds of two pipeline stages; more than there are replicas."""


def build_engine(args: NeoXArgs, source: CheckpointSource, groups: Groups, device: torch.device) -> tuple[TrainEngine, ModelSpec]:
    """The engine, with the weights of `source` in it, and what its model is."""
    spec, weights = opened(args, source, groups.tp)
    pipelined = args.runtime.pipe_parallel_size >= 1
    config = deepspeed_config(args)
    partitioning = Partitioning(config, groups)
    loss_of_step = LossOfStep()
    trainable = Trainable(partitioning, loss_of_step if pipelined else None)
    model = build_model(args, spec, weights, groups, device, place=source.place, trainable=trainable)
    count = sum(entries_of(p) for p in model.parameters())
    log.info(" > number of parameters on model parallel rank %d: %d", groups.tp.rank, count)
    log.info(" > total params: %s", f"{total_parameters(model, groups, device):,}")
    say_what_serves_flash(spec, device, parameter_dtype(args))
    optimizer = build_optimizer(args, model, device)
    runner = Runner(
        model,
        optimizer,
        build_scheduler(args, optimizer),
        config,
        groups,
        pipelined=pipelined,
        save_optimizer=not args.checkpoint.no_save_optim,
    )
    timers = Timers(device, enabled=args.logs.wall_clock_breakdown)
    path = PipelinePath(runner, loss_of_step, device, timers) if pipelined else SequentialPath(runner, device, timers)
    return TrainEngine(runner, path, device, timers, context_plan(spec, groups)), spec


@dataclass(frozen=True)
class Trainable:
    """What a model is built with when DeepSpeed will train it.

    partitioning: ZeRO's
    loss_of_step: given, the model is DeepSpeed's module of pipeline stages
    """

    partitioning: Partitioning
    loss_of_step: LossOfStep | None = None


def build_model(
    args: NeoXArgs,
    spec: ModelSpec,
    weights: Weights | None,
    groups: Groups,
    device: torch.device,
    *,
    place: Path,
    trainable: Trainable | None = None,
) -> torch.nn.Module:
    """The part of the model that this rank holds at the layout of `groups`, with its weights.

    weights: of this tensor rank; None = initial ones. place: where they are from
    trainable: None = a frozen model in evaluation mode: a Transformer, over several stages a StagedTransformer
    """
    gather = None if trainable is None else trainable.partitioning.gather
    model: torch.nn.Module
    if trainable is None:
        model = build_transformer(args, spec, groups=groups, device=device).requires_grad_(False).eval()
    elif trainable.loss_of_step is not None:
        model = build_pipeline(args, spec, loss_fn=trainable.loss_of_step, groups=groups).to(device)
    else:
        with trainable.partitioning.building():
            model = build_transformer(args, spec, groups=groups, gather=gather)
        model = model if trainable.partitioning.active else model.to(device)
    if weights is not None:
        slots = range(spec.num_layers + 5) if groups.pp.size > 1 else ()
        report = copy_weights(weights.tensors, model, place, elsewhere=slots, gather=gather, shapes=weights.shapes)
        log.info("  successfully loaded %s (%s parameters)", report.path, f"{report.parameters:,}")
    return model


def total_parameters(model: torch.nn.Module, groups: Groups, device: torch.device) -> int:
    """Number of the whole model's parameters; a collective call of all ranks."""
    mark_split(model)
    counted = counted_here(groups.tp)
    own = torch.tensor(sum(entries_of(p) for p in model.parameters() if counted(p)), dtype=torch.int64, device=device)
    return int(all_reduce(all_reduce(own, groups.tp), groups.pp).item())


def say_what_serves_flash(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    """One line where `flash` in attention_config is served without the flash-attn package."""
    mixers = [block.mixer for block in spec.blocks]
    asked = next((mixer for mixer in mixers if isinstance(mixer, AttentionSpec) and mixer.flash), None)
    if asked is None or asked.backend is not BackendName.AUTO:
        return
    reason = refuses(BackendName.FLASH_ATTN, asked, device, dtype)
    if reason is not None:
        log.info("attention type flash is exact fused attention by PyTorch here: %s", reason)


def build_checkpointer(
    args: NeoXArgs,
    engine: Engine,
    spec: ModelSpec,
    *,
    kept: Callable[[], Mapping[str, Any]],
    listeners: Sequence[Callable[[Path], None]],
    run_id: str,
) -> Checkpointer | None:
    """What writes the checkpoints of this run; None without `save`.

    kept:      gives what is to be found again after a resume
    listeners: are told each folder that is complete, on the first rank
    """
    section, before = args.checkpoint, kept()
    if not section.save:
        return None

    def published(folder: Path) -> None:
        for listener in listeners:
            listener(folder)

    return Checkpointer(
        engine=engine,
        directory=Path(section.save),
        compared=compared_args(args),
        configs=args.config_files,
        rng=not section.no_save_rng,
        kept=kept,
        optimizer=not section.no_save_optim,
        forward=forward_of(args, engine, spec) if section.checkpoint_validation_with_forward_pass else None,
        keep_last=section.keep_last_n_checkpoints,
        keep_every=section.keep_every,
        protected=frozenset(section.extra_save_iters or ()),
        published=published,
        about={
            "run_id": run_id,
            "layout": _layout(args, engine.groups),
            "code_version": code_version(),
            "data": before.get("data", {}),
            "config": redact_mapping({key: value for key, value in args.to_flat().items() if key != "config_files"}),
            "origin": before.get(STARTED_FROM, {}),
        },
        background=section.checkpoint_async,
        failures_allowed=section.checkpoint_failures_allowed,
    )


def _layout(args: NeoXArgs, groups: Groups) -> dict[str, int | str | bool]:
    """How files are sharded over ranks, for the manifest."""
    return {
        "pipe": groups.pp.size,
        "tensor": groups.tp.size,
        "context": groups.cp.size,
        "data": groups.dp.size,
        "zero_stage": int((args.optim.zero_optimization or {}).get("stage", 0)),
        "precision": str(args.model.precision),
        "pipelined": bool(args.runtime.pipe_parallel_size),
    }


def forward_of(args: NeoXArgs, engine: Engine, spec: ModelSpec) -> Callable[[], torch.Tensor]:
    """Gives the logits of a fixed input, when called on all ranks."""
    seq_length = required(args.model.seq_length, "seq_length")
    return lambda: forward_pass(engine, vocab_size=spec.vocab_size, seq_length=seq_length)
