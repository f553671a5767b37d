# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files whose tensors are made one at a time, in shards with an index. Knows no names' meaning.

FORMAT: eight bytes with the header's length, little-endian; a JSON header name -> dtype, shape, first and last byte; the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from megatron.checkpoint.formats.hf_files import INDEX, WEIGHTS, write_json
from megatron.errors import CheckpointError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

PIECE = 64 << 20


@dataclass(frozen=True)
class Planned:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


def sharded(plan: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """The plan in order, in groups of at most `limit` bytes; a larger tensor stands alone.

    >>> [len(s) for s in sharded([Planned("a", (4,), torch.float32), Planned("b", (4,), torch.float32)], 16)]
    [1, 1]
    """
    groups: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if groups[-1] and size + planned.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(planned)
        size += planned.bytes
    return groups


def write_shards(
    directory: Path,
    plan: Sequence[Planned],
    tensors: Iterable[tuple[str, Tensor]],
    note: Callable[[str, Tensor], memoryview],
    *,
    limit: int,
) -> None:
    """Write `tensors`, which come in the order of `plan`, and the index where there is more than one file; on disk when this returns.

    note: is told every tensor, and gives its bytes
    """
    groups = sharded(plan, limit)
    files = [WEIGHTS] if len(groups) == 1 else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    coming = iter(tensors)
    for file, group in zip(files, groups, strict=True):
        with (directory / file).open("wb") as handle:
            handle.write(header(group))
            _write_group(handle, group, coming, note)
            handle.flush()
            os.fsync(handle.fileno())
    if len(files) > 1:
        table = {planned.name: file for file, group in zip(files, groups, strict=True) for planned in group}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(planned.bytes for planned in plan)}, "weight_map": table})


def _write_group(
    handle: IO[bytes], group: Sequence[Planned], coming: Iterator[tuple[str, Tensor]], note: Callable[[str, Tensor], memoryview]
) -> None:
    for planned in group:
        name, tensor = next(coming)
        if (name, tuple(tensor.shape)) != (planned.name, planned.shape):
            raise CheckpointError(f"{name} is {tuple(tensor.shape)}, and {planned.name} of {planned.shape} was expected")
        content = note(name, tensor.to(planned.dtype))
        # In pieces, since one write of more than 2 GB is cut short by Linux.
        for start in range(0, len(content), PIECE):
            handle.write(content[start : start + PIECE])


def header(group: Sequence[Planned]) -> bytes:
    """Of one file; padded with blanks so that the tensors begin at a multiple of eight."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in group:
        end = offset + planned.bytes
        content[planned.name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
