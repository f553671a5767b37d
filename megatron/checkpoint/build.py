# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> what to load, and the model specification that fits it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron.checkpoint.formats.neox_files import bookkeeping
from megatron.checkpoint.loading.hf_view import HFFolder, HFModel, fetch, is_hf
from megatron.checkpoint.loading.merge_tp import MLP_OUTPUTS, Shard, read_shards, shard_for, width_over
from megatron.checkpoint.loading.resume_state import COMPARED_ARGS, only_filling_differs
from megatron.checkpoint.steps.discovery import Search, find, nothing_saved
from megatron.checkpoint.steps.manifest import Verify
from megatron.checkpoint.steps.run_lock import RunLock, held
from megatron.checkpoint.steps.step_dirs import named_step, recover
from megatron.checkpoint.steps.upload import Uploader
from megatron.hub.s3 import Address, open_client, require_boto3
from megatron.log import get_logger
from megatron.model.build_spec import build_spec, mlp_convention_of
from megatron.model.spec import MLPSpec, ModelSpec
from megatron.mpu.collectives import on_first_rank
from megatron.mpu.groups import Group
from megatron.neox_arguments import NeoXArgs

log = get_logger(__name__)


STARTED_FROM = "started_from"
"""Under this name checkpoints keep the Hugging Face model whose weights the run began with, through every resume."""


class Take(Enum):
    """What is taken from a checkpoint."""

    NOTHING = "nothing"
    WEIGHTS = "weights"  # finetune: iteration 0, fresh optimizer
    WEIGHTS_AND_POSITION = "weights and position"  # no_load_optim: iteration, data position and random state too
    EVERYTHING = "everything"


@dataclass(frozen=True)
class CheckpointSource:
    """Where a run starts from. hf: a Hugging Face model instead of a checkpoint."""

    take: Take
    directory: Path | None = None
    tag: str | None = None
    hf: HFFolder | None = None

    @property
    def folder(self) -> Path | None:
        """The step's folder."""
        return None if self.directory is None or self.tag is None else self.directory / self.tag

    @property
    def place(self) -> Path:
        """Where the files are, for messages."""
        return self.hf.directory if self.hf is not None else self.folder or Path()


def choose_source(args: NeoXArgs, world: Group | None = None) -> CheckpointSource:
    """Decide what `load`, `iteration`, `finetune` and `no_load_optim` ask for. Call on every rank.

    A folder without any checkpoint is an error, unless it is also where this run saves: then the run starts there.
    A Hugging Face model is where a run starts; once `save` holds a checkpoint, the run goes on from that, unless `finetune` is set.
    Raises CheckpointError.
    """
    section, world = args.checkpoint, world or Group.single()
    if not section.load:
        return CheckpointSource(Take.NOTHING)
    if is_hf(section.load):
        return _hf_or_own(args, world)
    search = search_of(args)
    same = bool(section.save) and Path(str(section.save)).resolve() == search.directory.resolve()
    if same and search.iteration is None and on_first_rank(lambda: nothing_saved(search.directory), world):
        log.info("no checkpoint in %s yet: starting from the beginning", search.directory)
        return CheckpointSource(Take.NOTHING)
    tag = find(replace(search, own=same and not section.finetune), world)
    return CheckpointSource(Take.WEIGHTS if section.finetune else _resumed(args), search.directory, tag)


def _hf_or_own(args: NeoXArgs, world: Group) -> CheckpointSource:
    section, verify = args.checkpoint, Verify(args.checkpoint.checkpoint_verify)
    if section.save and not section.finetune:
        directory = Path(str(section.save))
        if section.iteration is not None or not on_first_rank(lambda: nothing_saved(directory), world):
            tag = find(Search(directory=directory, iteration=section.iteration, own=True, verify=verify), world)
            log.info("%s holds a checkpoint of this run: it goes on from %s, and %s is not read", directory, tag, section.load)
            return CheckpointSource(_resumed(args), directory, tag)
    return CheckpointSource(Take.WEIGHTS, hf=fetch(str(section.load), world, contents=verify is Verify.FULL))


def _resumed(args: NeoXArgs) -> Take:
    return Take.WEIGHTS_AND_POSITION if args.checkpoint.no_load_optim else Take.EVERYTHING


class Weights(NamedTuple):
    """Of one tensor rank, made on access. shapes: where they are known without reading"""

    tensors: Shard
    shapes: Mapping[str, torch.Size] | None = None


def opened(args: NeoXArgs, source: CheckpointSource, tp: Group) -> tuple[ModelSpec, Weights | None]:
    """What the model is, and the weights of this tensor rank where weights alone are taken: names are compared, tensors read on access.

    Raises ConfigError or CheckpointError for a source that does not fit the configuration.
    """
    if source.hf is not None:
        model = HFModel.open(source.hf.directory)
        spec = hf_spec(args, model)
        log.info("weights are taken from %s: iteration 0, fresh optimizer", source.hf.address)
        return spec, Weights(shard_for([model.weights(spec)], spec, tp), hf_shapes(model, spec, tp))
    spec = spec_for(args, source.folder)
    if source.folder is None or source.take not in (Take.WEIGHTS, Take.WEIGHTS_AND_POSITION):
        return spec, None
    padding = only_filling_differs(compared_args(args), bookkeeping(source.folder, deepspeed_types=True).get("args"))
    return spec, Weights(shard_for(read_shards(source.folder), spec, tp, padding=padding))


def hf_shapes(model: HFModel, spec: ModelSpec, tp: Group) -> dict[str, torch.Size]:
    """Of this tensor rank's weights, from the headers of the files."""
    return {name: tensor.shape for name, tensor in shard_for([model.weights(spec, empty=True)], spec, tp).items()}


def hf_spec(args: NeoXArgs, model: HFModel) -> ModelSpec:
    """The configured model's specification, known to be the one of a Hugging Face model, whose vocabulary it may fill up.

    Raises ConfigError naming every difference; no tensor is read.
    """
    spec = build_spec(args)
    width = model.keys.get("intermediate_size")  # columns of the MLP's second matrix
    convention = None if width is None or not spec.blocks[0].mlp.gated else mlp_convention_of(args, int(width))
    if convention is not None and spec.blocks[0].mlp.width != width:
        spec = build_spec(args, mlp_convention=convention)
    model.require_same(args.to_flat(), spec)
    return spec


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
    gated = next((block.ffn for block in spec.blocks if isinstance(block.ffn, MLPSpec) and block.ffn.gated), None)
    if folder is None or gated is None:
        return spec
    width = width_over(read_shards(folder), MLP_OUTPUTS, 1) or gated.width
    convention = mlp_convention_of(args, width)
    if convention is None or width == gated.width:
        return spec
    what = "intermediate_size %s is read in the %s sense, MLP width %d, as in the checkpoint %s"
    log.info(what, args.model.intermediate_size, convention, width, folder)
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
