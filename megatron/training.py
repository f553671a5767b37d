# SPDX-License-Identifier: Apache-2.0
"""pretrain(args): puts the parts together and runs the loop. Each part is built elsewhere; nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch

from megatron import faults
from megatron.checkpoint.build import Source, Take, choose_source, compared_args, own_folder
from megatron.checkpoint.neox_store import bookkeeping
from megatron.data.batch import Batch
from megatron.data.build import DataSplits, build_data
from megatron.engine.base import Engine
from megatron.engine.build import build_engine, join_job
from megatron.engine.forward_check import compare_forward, forward_pass
from megatron.engine.persistence import Position, resume_everything, resume_position
from megatron.errors import DataError, required
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.hooks.build import build_hooks, build_stop
from megatron.hooks.characters import PER_CHARACTER, Characters
from megatron.hooks.locking import LockHook
from megatron.hooks.stopping import StopRequest
from megatron.hooks.validation import Evaluate
from megatron.launch.signals import noting_signals
from megatron.log import get_logger, setup_logging
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import any_rank, barrier
from megatron.mpu.groups import Groups
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.document import argument_lines
from megatron.neox_arguments.rules import refuse_unfinished
from megatron.objectives.base import Objective
from megatron.objectives.build import build_objective
from megatron.tokenizer.build import build_tokenizer, with_vocabulary

log = get_logger(__name__)


def pretrain(args: NeoXArgs) -> TrainState:
    """Train the configured model to `train_iters`; returns the state it ended in, and in it what the process's end means.

    A signal to any rank, from now on, ends the run at a step boundary. Raises NeoXError for everything a user can mend.
    """
    setup_logging()
    with noting_signals(insisting=True) as received:
        return _pretrain(args, received)


def _pretrain(args: NeoXArgs, received: Sequence[int]) -> TrainState:
    for line in argument_lines(args):
        log.info(line)
    refuse_unfinished(args)
    idle = args.ignored_keys()
    if idle:
        log.warning("these keys do nothing: %s", ", ".join(idle))
    groups, device = join_job(args)
    faults.point("set-up")
    stop = build_stop(args, received, lambda flag: any_rank(flag, groups.world, device))
    with own_folder(args, groups.world) as check_owner:
        return run(args, groups, device, stop, check_owner)


def run(args: NeoXArgs, groups: Groups, device: torch.device, stop: StopRequest, check_owner: Callable[[], None]) -> TrainState:
    """Build the parts and train, as one of `groups`.

    stop:        whether the run is to stop early
    check_owner: raises when the folder that is saved to is another run's by now
    """
    tokenizer = build_tokenizer(args)
    args = with_vocabulary(args, tokenizer)
    objective = build_objective(args, eod=tokenizer.eod)
    data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size, barrier=lambda: barrier(groups.world))
    if args.run.train_epochs:
        args = args.replace(train_iters=data.train_iters, train_epochs=None)
    source = choose_source(args, groups.world)
    engine, spec = build_engine(args, source, groups, device)
    position = take_up(args, source, engine)
    check_forward(args, source, engine, spec)
    target = required(args.run.train_iters, "train_iters")
    state = TrainState(iteration=position.iteration, target=target, samples=position.samples, tokens=position.tokens)
    splits = frozenset(name for name in ("valid", "test") if getattr(data, name) is not None)
    counting = Counting(tokenizer.decode, tokenizer.eod) if args.run.char_level_ppl else None
    stop.require_time()
    evaluate = evaluator(args, data, objective, engine, stop=stop, counting=counting)
    hooks = build_hooks(args, engine=engine, spec=spec, evaluate=evaluate, position=position, splits=splits, stop=stop)
    hooks.insert(0, LockHook(check_owner))
    batches = data.train.batches(objective.collate, start_sample=state.samples) if state.iteration < state.target else iter(())
    steps = in_steps(batches, required(args.run.gradient_accumulation_steps, "gradient_accumulation_steps"))
    end = train(engine, engine.timers.over("batch generator", steps), objective, hooks, state)
    return replace(end, status=stop.status(kept=bool(args.checkpoint.save) and end.iteration > position.iteration))


def take_up(args: NeoXArgs, source: Source, engine: Engine) -> Position:
    """Where the run goes on, after what `source` gives was taken."""
    if source.directory is None or source.tag is None or source.take in (Take.NOTHING, Take.WEIGHTS):
        return Position()
    compared, rng = compared_args(args), not args.checkpoint.no_load_rng
    batch_size = required(args.run.train_batch_size, "train_batch_size")
    if source.take is Take.WEIGHTS_AND_POSITION:
        return resume_position(engine, source.directory / source.tag, compared=compared, batch_size=batch_size, rng=rng)
    return resume_everything(engine, source.directory, source.tag, compared=compared, batch_size=batch_size, rng=rng)


def check_forward(args: NeoXArgs, source: Source, engine: Engine, spec: ModelSpec) -> None:
    """With `checkpoint_validation_with_forward_pass`: compare the model that was read with the one that was saved."""
    if source.folder is None or not args.checkpoint.checkpoint_validation_with_forward_pass:
        return
    logits = forward_pass(engine, vocab_size=spec.vocab_size, seq_length=required(args.model.seq_length, "seq_length"))
    compare_forward(bookkeeping(source.folder, deepspeed_types=True), logits, source.folder)


class Counting(NamedTuple):
    """What tells how many characters tokens stand for; see Characters."""

    decode: Callable[[list[int]], str]
    eod: int


def evaluator(
    args: NeoXArgs, data: DataSplits, objective: Objective, engine: Engine, *, stop: StopRequest, counting: Counting | None = None
) -> Evaluate:
    """(split, iterations) -> metrics over that many global batches, always from the split's first sample on.

    stop:     where the run is to stop, a pass is broken off and gives None
    counting: also give how many tokens stand for one character
    """
    micro_batches = required(args.run.gradient_accumulation_steps, "gradient_accumulation_steps")

    def evaluate(split: str, iterations: int) -> Mapping[str, float] | None:
        dataset = {"valid": data.valid, "test": data.test}[split]
        if dataset is None:
            raise DataError(f"there is no {split} data", where=f"{split}_data_paths", mend=f"give {split}_data_paths, or set eval_iters: 0")
        batches = stop.until(islice(dataset.batches(objective.collate, start_sample=0), iterations * micro_batches))
        characters = None if counting is None else Characters(*counting)
        metrics = engine.eval_step(objective, batches if characters is None else characters.counted(batches))
        if characters is not None:
            metrics = {**metrics, PER_CHARACTER: characters.per_character(engine.groups.dp, engine.device)}
        return None if stop.reason else metrics

    return evaluate


def in_steps(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Micro batches -> the lists of `size` that make one optimizer step."""
    while step := list(islice(batches, size)):
        yield step


def train(engine: Engine, steps: Iterator[list[Batch]], objective: Objective, hooks: Sequence[Hook], state: TrainState) -> TrainState:
    """The loop: draw a step's micro batches, step, tell the hooks."""
    try:
        for hook in hooks:
            hook.on_start(state, engine)
        while state.iteration < state.target:
            faults.begin_step(state.iteration + 1)
            faults.point("step")
            result = engine.train_step(objective, next(steps))
            state = state.after(samples=result.samples, tokens=result.tokens)
            verdicts = [hook.after_step(state, result, engine) for hook in hooks]
            if Verdict.STOP in verdicts:
                break
        for hook in hooks:
            hook.on_stop(state, engine)
    except BaseException as error:
        for hook in hooks:
            hook.on_error(state, error)
        raise
    return state
