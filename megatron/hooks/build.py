# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs and the parts of a run -> its hooks, in the order in which they act."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from megatron.checkpoint.build import STARTED_FROM, build_uploader
from megatron.checkpoint.conversion.build import build_exporter
from megatron.checkpoint.conversion.export import Exporter
from megatron.checkpoint.steps.upload import Uploader
from megatron.engine.base import Engine
from megatron.engine.build import build_checkpointer
from megatron.engine.checkpointer import Checkpointer
from megatron.engine.restore import TrainPosition
from megatron.errors import ConfigError
from megatron.hooks.base import Hook
from megatron.hooks.build_trackers import build_openers
from megatron.hooks.checkpointing import EARLY_S, PATIENCE_S, CheckpointHook, SavePlan, WorkerHook
from megatron.hooks.console import ConsoleHook, tee_log
from megatron.hooks.metrics import NAME, ClosingHook, MetricsFile, MetricsHook, StepFlops
from megatron.hooks.nonfinite_and_spikes import ActingHook, NumbersHook, NumbersPlan, Policy, Record
from megatron.hooks.norms import NoiseScaleHook, NormsHook, NormsPlan, Send
from megatron.hooks.profiling import MemoryHook, ProfilingHook, require_cuda
from megatron.hooks.replica_consistency import ReplicaHook
from megatron.hooks.stopping import Limits, StopHook, StopRequest, WallClock, job_end
from megatron.hooks.trackers import (
    KEPT,
    tracker_ids,
)
from megatron.hooks.validation import Evaluate, ValidationHook
from megatron.log import get_logger
from megatron.model.slots import reported_flops_per_step
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import any_rank, on_first_rank

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

log = get_logger(__name__)

RUN_ID = "run_id"
"""Key under which they keep the name of the run itself: made once, the same after every resume."""


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What hooks need of a run beyond its configuration.

    rank:           global rank
    flops:          of one optimizer step
    checkpoints:    writes the run's checkpoints; None = the run keeps none
    uploader:       copies them elsewhere; None = nobody does, or another rank
    exporter:       writes them in another format; None likewise
    evaluate:       (split, batches) -> metrics; called on all ranks. None = never evaluate
    splits:         which of "valid", "test" have data
    tracker_ids:    the run's ids at its trackers
    resumed:        whether tracker_ids come from a checkpoint
    stop:           whether the run is to stop early
    record:         what the run remembers of its numbers
    any_rank:       "true on any rank?", the same answer on every rank
    """

    rank: int = 0
    flops: StepFlops = StepFlops()
    checkpoints: Checkpointer | None = None
    uploader: Uploader | None = None
    exporter: Exporter | None = None
    evaluate: Evaluate | None = None
    splits: frozenset[str] = frozenset()
    tracker_ids: Mapping[str, str] = field(default_factory=dict)
    resumed: bool = False
    stop: StopRequest = field(default_factory=StopRequest)
    record: Record = field(default_factory=Record)
    any_rank: Callable[[bool], bool] = bool


class Ends(NamedTuple):
    """What may end a run early, or turn it back: a request to stop, and what it remembers of its numbers."""

    stop: StopRequest
    record: Record


def build_hooks(
    args: NeoXArgs,
    *,
    engine: Engine,
    spec: ModelSpec,
    evaluate: Evaluate,
    position: TrainPosition,
    splits: frozenset[str],
    ends: Ends,
) -> list[Hook]:
    """The hooks of a training run. Call on every rank.

    position: where the run starts; what checkpoints keep of the run is in `position.kept`
    splits:   which of "valid", "test" have data
    ends:     what may end or turn back the run

    Raises ConfigError or BackendError when a requested tracker cannot be used.
    """
    world, batch = engine.groups.world, args.run.train_batch_size or 0
    if args.logs.memory_profiling:
        # Every rank says no: one alone would leave the others waiting.
        require_cuda(engine.device)
    ids = tracker_ids(position.kept)
    run_id = on_first_rank(lambda: str(position.kept.get(RUN_ID) or uuid4().hex), world)
    uploader = build_uploader(args, rank=world.rank)
    exporter = build_exporter(args, spec, rank=world.rank, started_from=position.kept.get(STARTED_FROM) or {})

    def kept() -> dict[str, Any]:
        return {**position.kept, KEPT: ids, RUN_ID: run_id, **ends.record.kept()}

    listeners = [part.published for part in (uploader, exporter) if part is not None]
    parts = RunParts(
        rank=world.rank,
        flops=StepFlops(
            hardware=reported_flops_per_step(spec, batch=batch, recompute=bool(args.run.checkpoint_activations)),
            model=reported_flops_per_step(spec, batch=batch, recompute=False),
            devices=world.size,
            peak_tflops=args.logs.peak_theoretical_tflops,
        ),
        checkpoints=build_checkpointer(args, engine, spec, kept=kept, listeners=listeners, run_id=run_id),
        uploader=uploader,
        exporter=exporter,
        evaluate=evaluate,
        splits=splits,
        tracker_ids=ids,
        resumed=KEPT in position.kept,
        stop=ends.stop,
        record=ends.record,
        any_rank=lambda flag: any_rank(flag, world, engine.device),
    )
    return assemble(args, parts)


def build_stop(args: NeoXArgs, received: Sequence[int], any_rank: Callable[[bool], bool]) -> StopRequest:
    """What ends the run early.

    received: signals to this process so far
    any_rank: "true on any rank?", the same answer on every rank
    """
    run = args.run
    limits = Limits(
        duration_s=None if run.exit_duration_in_mins is None else 60.0 * run.exit_duration_in_mins,
        killed_at=job_end(os.environ),
        margin_s=run.exit_margin_in_secs,
        grace_s=run.grace_in_secs,
    )
    return StopRequest(received, wall=WallClock(limits), any_rank=any_rank)


def assemble(args: NeoXArgs, parts: RunParts) -> list[Hook]:
    """The hooks, in the order in which they act; `build_hooks` with the run's parts taken apart already."""
    logs = args.logs
    if logs.log_dir:
        tee_log(Path(logs.log_dir))
    metrics = MetricsHook(
        log_interval=logs.log_interval,
        flops=parts.flops,
        file=_metrics_file(args) if parts.rank == 0 else None,
        openers=build_openers(args, parts.rank, parts.tracker_ids, resumed=parts.resumed),
    )
    # What adds to a step's row stands before the row is written.
    numbers = NumbersHook(plan=_numbers_plan(args), record=parts.record, send=metrics.attach, any_rank=parts.any_rank)
    hooks: list[Hook] = [*measures(args, metrics.attach), numbers, metrics]
    if parts.rank == 0:
        hooks.append(ConsoleHook(log_interval=logs.log_interval, flops=parts.flops, live=sys.stdout.isatty()))
    hooks.append(ActingHook(numbers))
    if args.run.replica_check_interval is not None:
        hooks.append(ReplicaHook(interval=args.run.replica_check_interval))
    if logs.profile and parts.rank == 0:
        directory = Path(_place(args, "profile"))
        hooks.append(ProfilingHook(start=logs.profile_step_start, stop=logs.profile_step_stop, directory=directory))
    if logs.memory_profiling and parts.rank == 0:
        place = logs.memory_profiling_path or _place(args, "memory_profiling", "memory_profiling_path")
        hooks.append(MemoryHook(stop=logs.profile_step_stop, directory=Path(place)))
    if parts.checkpoints is not None and args.checkpoint.save:
        hooks.append(
            CheckpointHook(plan=_save_plan(args), checkpoints=parts.checkpoints, report=metrics.attach, took=parts.stop.wall.save_took)
        )
    validation = _validation(args, parts, metrics)
    if validation is not None:
        hooks.append(validation)
    hooks.append(StopHook(parts.stop, rank=parts.rank, exit_interval=args.run.exit_interval))
    hooks += _workers(parts, metrics.attach)
    return [*hooks, ClosingHook(metrics)]


def _workers(parts: RunParts, report: Send) -> list[Hook]:
    """What exports and uploads the checkpoints, in this order."""
    hooks: list[Hook] = []
    hurried = parts.stop.told_to_stop
    if parts.exporter is not None:
        drain = partial(parts.exporter.drain, hurried=hurried, early_s=EARLY_S)
        hooks.append(WorkerHook(parts.exporter, "export", report=report, drain=drain))
    if parts.uploader is not None:
        drain = partial(parts.uploader.drain, patience_s=PATIENCE_S, hurried=hurried, early_s=EARLY_S)
        hooks.append(WorkerHook(parts.uploader, "upload", report=report, drain=drain))
    return hooks


def _numbers_plan(args: NeoXArgs) -> NumbersPlan:
    run = args.run
    return NumbersPlan(
        nonfinite=Policy(run.nonfinite_policy),
        nonfinite_limit=run.nonfinite_limit,
        rollback_limit=run.rollback_limit,
        spike_factor=run.loss_spike_factor,
        spike_window=run.loss_spike_window,
        spike_patience=run.loss_spike_patience,
        spike=Policy(run.loss_spike_policy),
    )


def _save_plan(args: NeoXArgs) -> SavePlan:
    section = args.checkpoint
    return SavePlan(
        factor=section.checkpoint_factor,
        logarithmic=section.checkpoint_scale == "log",
        extra=frozenset(section.extra_save_iters or ()),
    )


def _validation(args: NeoXArgs, parts: RunParts, metrics: MetricsHook) -> ValidationHook | None:
    """The evaluation hook, or None when there is nothing to evaluate with."""
    run = args.run
    valid = "valid" in parts.splits and run.do_valid is not False and run.eval_iters > 0
    test = "test" in parts.splits and run.do_test is not False and run.eval_iters > 0
    if parts.evaluate is None or not (valid or test):
        return None
    return ValidationHook(
        evaluate=parts.evaluate, interval=run.eval_interval or 0, iters=run.eval_iters, valid=valid, test=test, report=metrics.report
    )


def measures(args: NeoXArgs, send: Send) -> list[Hook]:
    """Hooks that measure gradients and weights on every rank; none unless asked for."""
    logs, run = args.logs, args.run
    plan = NormsPlan(
        parameters=logs.log_param_norm, gradients=logs.log_grad_norm, zeros=logs.log_grad_pct_zeros, states=logs.log_optimizer_states
    )
    hooks: list[Hook] = [NormsHook(plan=plan, send=send)] if plan.anything else []
    if logs.log_gradient_noise_scale:
        hooks.append(
            NoiseScaleHook(
                micro_batches=run.gradient_accumulation_steps or 1,
                batch=run.train_batch_size or 1,
                steps=logs.gradient_noise_scale_n_batches,
                send=send,
            )
        )
    return hooks


def _place(args: NeoXArgs, key: str, first: str = "tensorboard_dir") -> str:
    """The folder for what `key` writes. Raises ConfigError when the run has none."""
    place = args.logs.tensorboard_dir or args.logs.log_dir or args.checkpoint.save
    if not place:
        raise ConfigError(f"{key} needs a folder to write to", where=key, fix=f"set {first}, log_dir or save")
    return place


def _metrics_file(args: NeoXArgs) -> MetricsFile | None:
    place = args.logs.log_dir or args.checkpoint.save
    if not place:
        log.info(f"no {NAME} is written: neither log_dir nor save is set")
        return None
    return MetricsFile(Path(place) / NAME)
