# SPDX-License-Identifier: Apache-2.0
"""Whole tensors of a step's folder, checked against the model before the first is read. Knows no other side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.neox_store import bookkeeping_file, check_fit
from megatron.checkpoint.reading import read_torch_file
from megatron.checkpoint.resharding import AT_ONCE, let_go
from megatron.checkpoint.state import LazyState, canonical_name, canonical_state
from megatron.checkpoint.verifying import Verify, look_at
from megatron.checkpoint.whole import join_shards, read_shards, shapes_of
from megatron.errors import CheckpointError
from megatron.model.block import unused_stored_prefixes
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups


def check_files(step: Path) -> None:
    """Raise CheckpointError where the folder has a manifest and is not what it says."""
    if problems := look_at(step, Verify.FULL).problems:
        raise CheckpointError(
            "the checkpoint is damaged: " + "; ".join(problems[:6]), where=str(step), mend="copy it again, or choose another step"
        )


class Whole:
    """The weights of a step, joined over tensor ranks on access; every AT_ONCE bytes the pages that were read are let go of."""

    def __init__(self, step: Path, spec: ModelSpec) -> None:
        """Raises CheckpointError, naming the tensors, where model and files differ."""
        self._step = step
        self._read = 0
        shards = read_shards(step)
        for rank, shard in enumerate(shards):
            tp = Group(rank=rank, size=len(shards), ranks=tuple(range(len(shards))))
            model = Transformer(spec, groups=Groups(tp=tp), device="meta")
            own, unused = canonical_state(model), tuple(map(canonical_name, unused_stored_prefixes(model)))
            check_fit(step, own, {name: shard[name].shape for name in shard}, unused)
        self.ranks = len(shards)
        self._weights = join_shards(shards, spec)
        self.names = list(shapes_of(spec))

    def dtypes(self) -> dict[str, torch.dtype]:
        """As the model has them; under ZeRO-3 the files have float32 ones only."""
        content = read_torch_file(bookkeeping_file(self._step), deepspeed_types=isinstance(self._weights, LazyState))
        module = content.get("module")
        if isinstance(self._weights, LazyState) and isinstance(module, Mapping) and module:
            found = {canonical_name(name): tensor.dtype for name, tensor in module.items() if isinstance(tensor, Tensor)}
            if set(self.names) <= set(found):
                return {name: found[name] for name in self.names}
        return {name: self._weights[name].dtype for name in self.names}

    def __getitem__(self, name: str) -> Tensor:
        """A whole tensor."""
        if self._read > AT_ONCE:
            self._read = 0
            let_go(self._step)
        tensor = self._weights[name]
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def state(self) -> LazyState:
        """As a mapping."""
        return LazyState({name: lambda name=name: self[name] for name in self.names})  # type: ignore[misc]
