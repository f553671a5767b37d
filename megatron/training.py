# SPDX-License-Identifier: Apache-2.0
"""pretrain(args): puts the parts together, finds where the run goes on, and runs the loop. Nothing is computed here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from megatron import fault_injection
from megatron.checkpoint.build import STARTED_FROM, CheckpointSource, Take, choose_source, compared_args, own_folder
from megatron.checkpoint.conversion.build import require_exportable
from megatron.checkpoint.formats.neox_files import bookkeeping
from megatron.checkpoint.loading.hf_view import HFModel
from megatron.checkpoint.loading.resume_state import SCHEDULE, tell_changes, watched_values
from megatron.checkpoint.steps.manifest import Verify
from megatron.data.batch import Batch, counting_samples
from megatron.data.build import DataSplits, build_data, data_fingerprint
from megatron.data.fingerprint import differences, require_same
from megatron.engine.base import Engine, StepResult
from megatron.engine.build import build_engine, forward_of, join_job
from megatron.engine.restore import TrainPosition, compare_forward, resume, rollback_folder
from megatron.errors import DataError, required
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.build import Ends, build_hooks, build_stop
from megatron.hooks.checkpointing import LockHook
from megatron.hooks.heartbeat import watched
from megatron.hooks.nonfinite_and_spikes import Record
from megatron.hooks.stopping import StopRequest
from megatron.hooks.validation import PER_CHARACTER, Characters, Evaluate
from megatron.launch.heartbeat import FOLDER, LOAD, RankProgress
from megatron.launch.rank_events import claimed
from megatron.launch.signals import noting_signals
from megatron.launch.watchdog import WatchPlan, watching
from megatron.log import get_logger, setup_logging
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import any_rank, barrier, of_all_ranks
from megatron.mpu.groups import Group, Groups
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.document import argument_lines
from megatron.neox_arguments.unfinished import refuse_unfinished
from megatron.objectives.base import Objective
from megatron.objectives.build import build_objective
from megatron.tokenizer.build import build_tokenizer, with_vocabulary

log = get_logger(__name__)


def pretrain(args: NeoXArgs, received: Sequence[int] | None = None) -> TrainState:
    """Train the configured model to `train_iters`; returns the state it ended in, and in it what the process's end means.

    received: signals to this process, where they are noted already

    A signal to any rank, from now on, ends the run at a step boundary. Raises NeoXError for everything a user can fix.
    """
    setup_logging()
    if received is not None:
        return _pretrain(args, received)
    with noting_signals(insisting=True) as noted:
        return _pretrain(args, noted)


def _pretrain(args: NeoXArgs, received: Sequence[int]) -> TrainState:
    for line in argument_lines(args):
        log.info(line)
    refuse_unfinished(args)
    idle = args.ignored_keys()
    if idle:
        log.warning("these keys do nothing: %s", ", ".join(idle))
    groups, device = join_job(args)
    fault_injection.point("set-up")
    stop = build_stop(args, received, lambda flag: any_rank(flag, groups.world, device))
    with own_folder(args, groups.world) as check_owner, watching(watch_plan(args, groups.world)) as progress:
        return run(args, groups, device, stop, check_owner, progress)


def watch_plan(args: NeoXArgs, world: Group) -> WatchPlan:
    """How this rank is watched: `heartbeat_interval_in_secs`, `hang_timeout_in_mins`."""
    place = args.checkpoint.save or args.logs.log_dir
    return WatchPlan(
        rank=world.rank,
        world=world.size,
        folder=Path(place) / FOLDER if place else None,
        interval_s=args.logs.heartbeat_interval_in_secs,
        limit_s=60.0 * args.logs.hang_timeout_in_mins or None,
        note=claimed(os.environ),
    )


def run(
    args: NeoXArgs, groups: Groups, device: torch.device, stop: StopRequest, check_owner: Callable[[], None], progress: RankProgress
) -> TrainState:
    """Build the parts and train, as one of `groups`.

    stop:        whether the run is to stop early
    check_owner: raises when the folder that is saved to is another run's by now
    progress:       is told what this rank is doing
    """
    tokenizer = build_tokenizer(args)
    args = with_vocabulary(args, tokenizer)
    require_exportable(args)
    objective = build_objective(args, eod=tokenizer.eod)
    data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size, barrier=lambda: barrier(groups.world))
    if args.run.train_epochs:
        args = args.replace(train_iters=data.train_iters, train_epochs=None)
    source = choose_source(args, groups.world)
    make_place(args)
    with progress.during(LOAD):
        engine, spec = build_engine(args, source, groups, device)
        position = as_before(args, source, take_up(args, source, engine, spec), objective.streams, groups.world)
        check_forward(args, source, engine, spec)
    target = required(args.run.train_iters, "train_iters")
    state = TrainState(iteration=position.iteration, target=target, samples=position.samples, tokens=position.tokens)
    splits = frozenset(name for name in ("valid", "test") if getattr(data, name) is not None)
    counting = partial(Characters, tokenizer.decode, tokenizer.eod) if args.run.char_level_ppl else None
    stop.require_time()
    evaluate = evaluator(args, data, objective, engine, stop=stop, counting=counting)
    record = Record.of(position.kept)
    hooks = build_hooks(args, engine=engine, spec=spec, evaluate=evaluate, position=position, splits=splits, ends=Ends(stop, record))
    hooks.insert(0, LockHook(check_owner))

    def steps_from(state: TrainState) -> Iterator[list[Batch]]:
        collate = counting_samples(objective.collate)
        done = state.iteration >= state.target
        batches = iter(()) if done else data.train.batches(collate, start_sample=state.samples, skipped=record.skipped)
        steps = in_steps(batches, required(args.run.gradient_accumulation_steps, "gradient_accumulation_steps"))
        return engine.timers.over("batch generator", steps)

    end = train(engine, steps_from, objective, watched(hooks, progress), state, rolling_back(args, engine, spec, record))
    return replace(end, status=stop.status(kept=bool(args.checkpoint.save) and end.iteration > position.iteration))


def rolling_back(args: NeoXArgs, engine: Engine, spec: ModelSpec, record: Record) -> Callable[[TrainState], TrainState]:
    """What takes the run from a state back to where `record` wants it to be."""

    def rewind(state: TrainState) -> TrainState:
        before = required(record.wanted, "the step to go back to").before
        directory = Path(required(args.checkpoint.save, "save"))
        folder = rollback_folder(directory, before, engine.groups.world, Verify(args.checkpoint.checkpoint_verify))
        batch_size = required(args.run.train_batch_size, "train_batch_size")
        position = resume(engine, folder, spec, compared=compared_args(args), batch_size=batch_size, rng=not args.checkpoint.no_save_rng)
        record.went_back(position.iteration)
        return replace(state, iteration=position.iteration, samples=position.samples, tokens=position.tokens)

    return rewind


def evaluator(
    args: NeoXArgs, data: DataSplits, objective: Objective, engine: Engine, *, stop: StopRequest, counting: Callable[[], Characters] | None
) -> Evaluate:
    """(split, iterations) -> metrics over that many global batches, always from the split's first sample on.

    stop:     where the run is to stop, a pass is broken off and gives None
    counting: makes what counts characters, for how many tokens stand for one; None = that is not given
    """
    micro_batches = required(args.run.gradient_accumulation_steps, "gradient_accumulation_steps")

    def evaluate(split: str, iterations: int) -> Mapping[str, float] | None:
        dataset = {"valid": data.valid, "test": data.test}[split]
        if dataset is None:
            raise DataError(f"there is no {split} data", where=f"{split}_data_paths", fix=f"give {split}_data_paths, or set eval_iters: 0")
        batches = stop.until(islice(dataset.batches(objective.collate, start_sample=0), iterations * micro_batches))
        characters = None if counting is None else counting()
        metrics = engine.eval_step(objective, batches if characters is None else characters.counted(batches))
        if characters is not None:
            metrics = {**metrics, PER_CHARACTER: characters.per_character(engine.groups.dp, engine.device)}
        return None if stop.reason else metrics

    return evaluate


def in_steps(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Micro batches -> the lists of `size` that make one optimizer step."""
    while step := list(islice(batches, size)):
        yield step


def train(
    engine: Engine,
    steps_from: Callable[[TrainState], Iterator[list[Batch]]],
    objective: Objective,
    hooks: Sequence[Hook],
    state: TrainState,
    rewind: Callable[[TrainState], TrainState],
) -> TrainState:
    """The loop: draw a step's micro batches, step, tell the hooks."""
    try:
        for hook in hooks:
            hook.on_start(state, engine)
        steps = steps_from(state)
        while state.iteration < state.target:
            fault_injection.begin_step(state.iteration + 1)
            fault_injection.point("step")
            result = engine.train_step(objective, next(steps))
            state = state.after(samples=result.samples, tokens=result.tokens)
            verdicts = verdicts_of(hooks, state, result, engine)
            if Verdict.ROLLBACK in verdicts:
                for hook in hooks:
                    hook.before_rollback(state, engine)
                state = rewind(state)
                steps = steps_from(state)
                for hook in hooks:
                    hook.after_rollback(state, engine)
            elif Verdict.STOP in verdicts:
                break
        for hook in hooks:
            hook.on_stop(state, engine)
    except BaseException as error:
        for hook in hooks:
            hook.on_error(state, error)
        raise
    return state


def verdicts_of(hooks: Sequence[Hook], state: TrainState, result: StepResult, engine: Engine) -> set[Verdict]:
    """What the hooks say to a step, in turn; after ROLLBACK no more are asked, since the step will not have been."""
    verdicts: set[Verdict] = set()
    for hook in hooks:
        verdicts.add(hook.after_step(state, result, engine))
        if Verdict.ROLLBACK in verdicts:
            break
    return verdicts


DATA, SETTINGS = "data", "settings"
"""Under these names checkpoints keep the data's fingerprint and the settings that `tell_changes` compares."""


def make_place(args: NeoXArgs) -> None:
    """The folders that this run writes to, from here on also its heartbeats. Who cannot write there finds out, and tells, when it must."""
    for place in filter(None, (args.checkpoint.save, args.logs.log_dir)):
        with suppress(OSError):
            Path(place).mkdir(parents=True, exist_ok=True)


def take_up(args: NeoXArgs, source: CheckpointSource, engine: Engine, spec: ModelSpec) -> TrainPosition:
    """Where the run goes on, after what `source` gives was taken."""
    if source.folder is None or source.take in (Take.NOTHING, Take.WEIGHTS):
        if source.hf is None:
            return TrainPosition()
        return TrainPosition(kept={STARTED_FROM: {**source.hf.told(), **HFModel.open(source.hf.directory).facts()}})
    loaded = None if source.take is Take.WEIGHTS_AND_POSITION else spec
    batch_size = required(args.run.train_batch_size, "train_batch_size")
    rng = not args.checkpoint.no_load_rng
    return resume(engine, source.folder, loaded, compared=compared_args(args), batch_size=batch_size, rng=rng)


def as_before(args: NeoXArgs, source: CheckpointSource, position: TrainPosition, streams: Sequence[str], world: Group) -> TrainPosition:
    """The position with what checkpoints from now on keep of data and settings; what a resume changes of them is told, or refused.

    Raises DataError when the data is not the checkpoint's, unless `allow_data_change`.
    """
    if not (args.checkpoint.save or source.folder):
        return position
    # One rank reads the files, as every rank would find the same.
    data = of_all_ranks(data_fingerprint(args, streams=streams) if world.rank == 0 else {}, world)[0]
    settings = watched_values(args.to_flat())
    if source.folder is not None and source.take in (Take.WEIGHTS_AND_POSITION, Take.EVERYTHING):
        before = position.kept
        if DATA in before and not args.data.allow_data_change:
            require_same(before[DATA], data, where=str(source.folder))
        if world.rank == 0:
            found = differences(before.get(DATA, data), data)
            # The schedule's own changes are told by the schedule.
            tell_changes(before.get(SETTINGS, {}), settings, without=SCHEDULE, further=found)
    return replace(position, kept={**position.kept, DATA: data, SETTINGS: settings})


def check_forward(args: NeoXArgs, source: CheckpointSource, engine: Engine, spec: ModelSpec) -> None:
    """With `checkpoint_validation_with_forward_pass`: compare the model that was read with the one that was saved."""
    if source.folder is None or not args.checkpoint.checkpoint_validation_with_forward_pass:
        return
    compare_forward(bookkeeping(source.folder, deepspeed_types=True), forward_of(args, engine, spec)(), source.folder)
