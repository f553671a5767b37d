# SPDX-License-Identifier: Apache-2.0
"""A directory of weights in another naming: Hugging Face's, or Meta's raw one. Knows no names' meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.formats.hf_files import CONFIG, read_config, read_state
from megatron.checkpoint.formats.meta_files import PARAMS, read_meta, shard_files
from megatron.checkpoint.mapping.families.meta_llama import META_LLAMA
from megatron.checkpoint.mapping.families.registry import family_of
from megatron.checkpoint.mapping.rows import Family


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
    return Foreign(
        path=directory, config=config, family=family_of(config), tensors=read_state(directory), vocab_size=int(config["vocab_size"])
    )
