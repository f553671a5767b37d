# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs and a checkpoint -> where the run goes on, and what is no longer as it was. Knows no hook."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron.checkpoint.build import STARTED_FROM, CheckpointSource, Take, compared_args
from megatron.checkpoint.formats.neox_files import bookkeeping
from megatron.checkpoint.loading.hf_model import HFModel
from megatron.checkpoint.loading.resume_state import SCHEDULE, tell_changes, watched_values
from megatron.data.build import data_fingerprint
from megatron.data.fingerprint import differences, require_same
from megatron.engine.base import Engine
from megatron.engine.logit_check import compare_forward, forward_pass
from megatron.engine.restore import TrainPosition, resume_everything, resume_position
from megatron.errors import required
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import of_all_ranks
from megatron.mpu.groups import Group
from megatron.neox_arguments import NeoXArgs

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
    compared, rng = compared_args(args), not args.checkpoint.no_load_rng
    batch_size = required(args.run.train_batch_size, "train_batch_size")
    if source.take is Take.WEIGHTS_AND_POSITION:
        return resume_position(engine, source.folder, compared=compared, batch_size=batch_size, rng=rng)
    return resume_everything(engine, source.folder, spec, compared=compared, batch_size=batch_size, rng=rng)


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
    logits = forward_pass(engine, vocab_size=spec.vocab_size, seq_length=required(args.model.seq_length, "seq_length"))
    compare_forward(bookkeeping(source.folder, deepspeed_types=True), logits, source.folder)
