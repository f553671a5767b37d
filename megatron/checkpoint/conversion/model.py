# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked for, and the model it converts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.conversion.reward import head_name
from megatron.checkpoint.formats.hf_files import SHARD_BYTES
from megatron.checkpoint.formats.torch_file import canonical_name, canonical_state
from megatron.checkpoint.loading.merge_tp import shardings_of
from megatron.model.block import unused_stored_prefixes
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.sharding import Sharding, Split

Finish = Callable[[Path], None]
"""(the folder, not yet under its name): adds files, or raises where it must not be kept."""


class Precision(str, Enum):
    """Of the tensors written; auto: as they are read."""

    AUTO = "auto"
    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @classmethod
    def of(cls, dtype: str | None) -> Precision:
        """Of a name like bfloat16; None: auto.

        >>> Precision.of("bfloat16").value, Precision.of(None).value
        ('bf16', 'auto')
        """
        return {None: cls.AUTO, "float16": cls.FP16, "bfloat16": cls.BF16, "float32": cls.FP32}[dtype]

    @property
    def dtype(self) -> torch.dtype | None:
        """None: each tensor keeps its own."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(self.value)


@dataclass(frozen=True)
class Described:
    """A model: our flat keys, resolved, and the specification that they give with the padded vocabulary of the files."""

    keys: Mapping[str, Any]
    spec: ModelSpec

    @property
    def reward(self) -> bool:
        """Whether it gives a score per position, not logits."""
        return self.keys.get("train_impl") == "rm"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Whole shape of each stored tensor by canonical name."""
        return self._outline[0]

    @property
    def unused(self) -> tuple[str, ...]:
        """Beginnings of names that a checkpoint may hold and the model does not read."""
        return self._outline[1]

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return sum(prod(shape) for shape in self.shapes.values())

    def shardings(self, ranks: int) -> dict[str, Sharding]:
        """How each stored tensor is spread over a number of tensor ranks."""
        table = shardings_of(self.spec, ranks) if ranks > 1 else {}
        return {**table, head_name(self.spec): Split(1)} if self.reward else table

    @cached_property
    def _outline(self) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        # Building a model costs a noticeable time even without numbers, so it is done once.
        module = Transformer(self.spec, device="meta")
        shapes = {name: tuple(tensor.shape) for name, tensor in canonical_state(module).items()}
        if self.reward:
            last = f"{self.spec.num_layers + 4}."
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(last)}
            shapes[head_name(self.spec)] = (1, self.spec.hidden_size)
        return shapes, tuple(map(canonical_name, unused_stored_prefixes(module)))


@dataclass(frozen=True, kw_only=True)
class HFChoice:
    """About a Hugging Face directory to be written.

    architecture: name of a family; None: the first one that can express the model
    preferred:    name of the family that is tried before the others
    vocab_size:   rows kept of the vocabulary; None: all, those that fill it up too
    fields:       of config.json, beyond what the family writes
    """

    architecture: str | None = None
    preferred: str | None = None
    precision: Precision = Precision.AUTO
    vocab_size: int | None = None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NeoXChoice:
    """About a checkpoint to be written.

    tensor:    ranks; pipe: stages, 0 = all weights in one file per tensor rank
    iteration: number of the step's folder
    dialect:   name of the family whose names the tensors get; None: ours
    args:      what the checkpoint keeps of the configuration, to be compared when it is loaded
    """

    tensor: int = 1
    pipe: int = 0
    iteration: int = 0
    precision: Precision = Precision.AUTO
    overwrite: bool = False
    dialect: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Of all directions. verify: compare logits; None: those of the whole model, or of a part of a large one"""

    source: Path
    out: Path
    precision: Precision = Precision.AUTO
    overwrite: bool = False
    verify: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ToHF(Common):
    """A step's folder (or that of several) -> a Hugging Face directory; what is None is found out.

    configs:   the run's files; empty: those kept in the step's folder
    reference: a Hugging Face directory of the same model, that says everything in place of them
    tokenizer: whether one is written; tokenizer_folder: of a Hugging Face tokenizer, in place of vocab_file
    """

    configs: Sequence[Path] = ()
    reference: Path | None = None
    iteration: int | None = None
    architecture: str | None = None
    vocab_size: int | None = None
    tokenizer: bool = True
    tokenizer_folder: Path | None = None
    pad_token_id: int | None = None
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class OutputLayout(Common):
    """What is written is a folder of checkpoints.

    tensor:  ranks; pipe: stages, 0 = all weights in one file per tensor rank
    dialect: name of the family whose names the tensors get; None: ours
    """

    tensor: int = 1
    pipe: int = 0
    iteration: int = 0
    dialect: str | None = None


@dataclass(frozen=True, kw_only=True)
class ToNeoX(OutputLayout):
    """A directory of Hugging Face's or Meta's -> a folder of checkpoints.

    divisible_by: rows of the vocabulary per tensor rank are a multiple of it
    """

    divisible_by: int = 1


@dataclass(frozen=True, kw_only=True)
class Rewrite(OutputLayout):
    """The weights of a checkpoint, in whatever dialect -> another layout. keys: of the configuration, where no file says them"""

    configs: Sequence[Path] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
