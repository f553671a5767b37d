# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> what to load, and the model specification that fits it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from megatron.checkpoint.discovery import Search, find, nothing_saved
from megatron.checkpoint.lock import RunLock, held
from megatron.checkpoint.publishing import recover
from megatron.checkpoint.resume import COMPARED_ARGS
from megatron.checkpoint.s3 import Address, open_client, require_boto3
from megatron.checkpoint.steps import named_step
from megatron.checkpoint.uploading import Uploader
from megatron.checkpoint.verifying import Verify
from megatron.checkpoint.whole import MLP_OUTPUTS, read_shards, width_over
from megatron.log import get_logger
from megatron.model.build import build_spec, mlp_convention_of
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import on_first_rank
from megatron.mpu.groups import Group
from megatron.neox_arguments import NeoXArgs

log = get_logger(__name__)


class Take(Enum):
    """What is taken from a checkpoint."""

    NOTHING = "nothing"
    WEIGHTS = "weights"  # finetune: iteration 0, fresh optimizer
    WEIGHTS_AND_POSITION = "weights and position"  # no_load_optim: iteration, data position and random state too
    EVERYTHING = "everything"


@dataclass(frozen=True)
class Source:
    """Where a run starts from."""

    take: Take
    directory: Path | None = None
    tag: str | None = None

    @property
    def folder(self) -> Path | None:
        """The step's folder."""
        return None if self.directory is None or self.tag is None else self.directory / self.tag


def choose_source(args: NeoXArgs, world: Group | None = None) -> Source:
    """Decide what `load`, `iteration`, `finetune` and `no_load_optim` ask for. Call on every rank.

    A folder without any checkpoint is an error, unless it is also where this run saves: then the run starts there.
    Raises CheckpointError.
    """
    section, world = args.checkpoint, world or Group.single()
    if not section.load:
        return Source(Take.NOTHING)
    search = search_of(args)
    same = bool(section.save) and Path(str(section.save)).resolve() == search.directory.resolve()
    if same and search.iteration is None and on_first_rank(lambda: nothing_saved(search.directory), world):
        log.info("no checkpoint in %s yet: starting from the beginning", search.directory)
        return Source(Take.NOTHING)
    tag = find(replace(search, own=same and not section.finetune), world)
    if section.finetune:
        return Source(Take.WEIGHTS, search.directory, tag)
    return Source(Take.WEIGHTS_AND_POSITION if section.no_load_optim else Take.EVERYTHING, search.directory, tag)


@contextmanager
def own_folder(args: NeoXArgs, world: Group) -> Iterator[Callable[[], None]]:
    """Within, no other run writes to `save`, and what a killed one left half done there is cleared up. Call on every rank.

    Yields what asks whether that still holds, and raises TrainingError when it does not.
    Raises ConfigError when another run has the folder.
    """
    locks: list[RunLock] = []
    with ExitStack() as stack:
        if args.checkpoint.save:
            on_first_rank(lambda: locks.append(stack.enter_context(_taken(Path(str(args.checkpoint.save))))), world)
        yield locks[0].check if locks else lambda: None


@contextmanager
def _taken(directory: Path) -> Iterator[RunLock]:
    with held(directory) as lock:
        for line in recover(directory):
            log.warning("%s: %s", directory, line)
        yield lock


def search_of(args: NeoXArgs) -> Search:
    """Which checkpoint `load` and `iteration` ask for, and how closely it is looked at."""
    section = args.checkpoint
    directory, iteration = named_step(Path(str(section.load)), section.iteration)
    return Search(directory=directory, iteration=iteration, verify=Verify(section.checkpoint_verify))


def spec_for(args: NeoXArgs, folder: Path | None) -> ModelSpec:
    """The model's specification; a checkpoint settles what an explicit gated `intermediate_size` means.

    FORMAT: GPT-NeoX reads `intermediate_size` of a gated MLP as 3/2 of the width, its fork as the width itself.
    """
    spec = build_spec(args)
    if folder is None or not spec.blocks[0].mlp.gated:
        return spec
    width = width_over(read_shards(folder), MLP_OUTPUTS, 1) or spec.blocks[0].mlp.width
    convention = mlp_convention_of(args, width)
    if convention is None or width == spec.blocks[0].mlp.width:
        return spec
    log.info(
        "intermediate_size %s is read in the %s sense, MLP width %d, as in the checkpoint %s",
        args.model.intermediate_size,
        convention,
        width,
        folder,
    )
    return build_spec(args, mlp_convention=convention)


def compared_args(args: NeoXArgs) -> dict[str, Any]:
    """What a checkpoint keeps under "args"."""
    flat = args.to_flat()
    return {key: flat.get(key) for key in COMPARED_ARGS}


def build_uploader(args: NeoXArgs, *, rank: int) -> Uploader | None:
    """What copies this run's checkpoints to `s3_path`, on the first rank; None where nothing is to be copied.

    Raises BackendError without boto3 (on every rank), ConfigError without credentials or bucket.
    """
    section = args.checkpoint
    if not (section.s3_path and section.save):
        return None
    require_boto3()
    if rank != 0:
        return None
    # FORMAT: <s3_path>/<name of save>/global_step<N>/..., as GPT-NeoX uploads.
    address = Address.of(section.s3_path).below(os.path.basename(os.path.abspath(section.save)))
    uploader = Uploader(Path(section.save), open_client(), address, part_bytes=section.s3_chunk_size)
    uploader.place.check()
    return uploader
