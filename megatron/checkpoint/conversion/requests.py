# SPDX-License-Identifier: Apache-2.0
"""What a person can ask of a conversion, as command lines say it. Knows no configuration object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.conversion.model import Precision
from megatron.checkpoint.formats.hf_files import SHARD_BYTES


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
