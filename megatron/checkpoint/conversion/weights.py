# SPDX-License-Identifier: Apache-2.0
"""Whole tensors to convert: of a step's folder, of a foreign directory, read ahead of the writer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron.checkpoint.conversion.model import HEAD, Described
from megatron.checkpoint.formats.hf_files import CONFIG, read_config, read_state
from megatron.checkpoint.formats.neox_files import check_fit, model_dtypes, zero3_partitioned
from megatron.checkpoint.formats.torch_file import LazyState
from megatron.checkpoint.loading.merge_tp import read_shards
from megatron.checkpoint.loading.reshard import AT_ONCE, let_go
from megatron.checkpoint.mapping.families import canonical_weights, family_of
from megatron.checkpoint.mapping.meta_llama import META_LLAMA, PARAMS, read_meta, shard_files
from megatron.checkpoint.mapping.rows import Family
from megatron.checkpoint.steps.manifest import Verify, look_at
from megatron.errors import CheckpointError
from megatron.mpu.sharding import Replicated, Summed, join, split

T = TypeVar("T")


def ahead(things: Iterable[T]) -> Iterator[T]:
    """The same things in order; a thread makes one of them in advance, and no more.

    >>> list(ahead(n * n for n in range(4)))
    [0, 1, 4, 9]
    """
    coming, end = iter(things), object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        following = pool.submit(next, coming, end)
        while (thing := following.result()) is not end:
            following = pool.submit(next, coming, end)
            made: Any = thing
            yield made


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A directory that was opened.

    vocab_size: rows of its vocabulary
    cheap:      tensors can be looked at without being read
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, Tensor]
    vocab_size: int
    cheap: bool = True

    def total_bytes(self) -> int:
        """About how much there is to read."""
        if not self.cheap:
            return sum(path.stat().st_size for path in shard_files(self.path))
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def open_foreign(directory: Path) -> Foreign:
    """Open a directory. Raises CheckpointError for missing or damaged files, ConfigError for an architecture that is not known."""
    if (directory / PARAMS).is_file() and not (directory / CONFIG).is_file():
        params, tensors = read_meta(directory)
        rows = int(params["vocab_size"])
        return Foreign(path=directory, config=params, family=META_LLAMA, tensors=tensors, vocab_size=rows, cheap=False)
    config = read_config(directory)
    family, rows = family_of(config), int(config["vocab_size"])
    return Foreign(path=directory, config=config, family=family, tensors=read_state(directory), vocab_size=rows)


def check_files(step: Path) -> None:
    """Raise CheckpointError where the folder has a manifest and is not what it says."""
    if problems := look_at(step, Verify.FULL).problems:
        what = "the checkpoint is damaged: " + "; ".join(problems[:6])
        raise CheckpointError(what, where=str(step), fix="copy it again, or choose another step")


class Whole:
    """The weights of a step, joined over tensor ranks on access; every AT_ONCE bytes the pages that were read are let go of."""

    def __init__(self, step: Path, model: Described, *, rounded: bool = False) -> None:
        """rounded: as the model has them also under ZeRO-3, whose files have the float32 masters.

        Raises CheckpointError, naming the tensors, where model and files differ."""
        self._step = step
        self._read = 0
        self._model = model
        stored = read_shards(step)
        ranks = len(stored)
        self._shards = [canonical_weights(shard, model.spec, ranks=ranks) for shard in stored]
        self.names = list(model.shapes)
        if not model.reward and any(name.endswith(HEAD) for name in stored[0]):
            what = "this is a reward model, and the configuration does not say so"
            raise CheckpointError(what, where=str(step), fix="give the configuration of its run, with train_impl: rm")
        self._how = model.shardings(ranks)
        for rank, shard in enumerate(self._shards):
            local = {
                name: split(torch.empty(shape, device="meta"), self._how.get(name, Replicated()), rank, ranks)
                for name, shape in model.shapes.items()
            }
            # What is made on access is looked at when it is read.
            lazy = local if isinstance(shard, LazyState) else {}
            check_fit(step, local, {name: (lazy[name] if name in lazy else shard[name]).shape for name in shard}, model.unused)
        self._rounded = self.dtypes() if rounded and zero3_partitioned(step) else {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, and so of most numbers."""
        return self._shards[0][self.names[0]].dtype

    @property
    def shares_round(self) -> bool:
        """Whether a weight is a sum of shares that cannot be the same numbers: a third of a number has no end."""
        ranks = len(self._shards)
        return ranks & (ranks - 1) != 0 and any(isinstance(how, Summed) for how in self._how.values())

    def dtypes(self) -> dict[str, torch.dtype]:
        """As the model has them; under ZeRO-3 the files have float32 ones only."""
        if zero3_partitioned(self._step):
            found = model_dtypes(self._step)
            if set(self.names) <= set(found):
                return {name: found[name] for name in self.names}
        return {name: self._shards[0][name].dtype for name in self.names}

    def __getitem__(self, name: str) -> Tensor:
        """A whole tensor."""
        if self._read > AT_ONCE:
            self._read = 0
            let_go(self._step)
        parts = [shard[name] for shard in self._shards]
        tensor = parts[0] if len(parts) == 1 else join(parts, self._how.get(name, Replicated()))
        if tuple(tensor.shape) != self._model.shapes[name]:
            what = f"{name} is {tuple(tensor.shape)} in the checkpoint and {self._model.shapes[name]} in the model"
            raise CheckpointError(what, where=str(self._step), fix="use the configuration that the checkpoint was trained with")
        self._read += tensor.numel() * tensor.element_size()
        return tensor.to(self._rounded[name]) if self._rounded else tensor

    def state(self) -> LazyState:
        """As a mapping."""
        return LazyState({name: lambda name=name: self[name] for name in self.names})  # type: ignore[misc]
