# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory: safetensors (or the older .bin files, read only), their index, config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.atomic_io import write_durably
from megatron.checkpoint.formats.torch_file import LazyState, tensor_table
from megatron.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_WEIGHTS = "pytorch_model.bin"
OLD_INDEX = "pytorch_model.bin.index.json"
CONFIG = "config.json"
_OLD_FIX = "give a model as save_pretrained wrote it"
SHARD_BYTES = 5 * 10**9


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError when it is missing or damaged."""
    return read_json(directory / CONFIG, fix="give a folder that a Hugging Face model was saved to")


def read_state(directory: Path, *, empty: bool = False) -> LazyState:
    """All tensors, each read from its file on access. Raises CheckpointError when files are missing or damaged.

    empty: tensors without numbers (device "meta", float32) that have the shapes
    """
    makers: dict[str, Callable[[], Tensor]] = {}
    for path in weight_files(directory):
        makers |= tensor_makers(path, empty=empty)
    return LazyState(makers)


def weight_files(directory: Path) -> list[Path]:
    """The files with the weights: safetensors, or where there are none the older .bin. Raises CheckpointError when one is missing."""
    old = not (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file()
    old = old and ((directory / OLD_INDEX).is_file() or (directory / OLD_WEIGHTS).is_file())
    index, single = (OLD_INDEX, OLD_WEIGHTS) if old else (INDEX, WEIGHTS)
    files = sorted(set(read_json(directory / index)["weight_map"].values())) if (directory / index).is_file() else [single]
    for file in files:
        if Path(file).name != file:
            what = f"{index} names {file}, which is not in the folder"
            raise CheckpointError(what, where=str(directory / index), fix="copy the model again from its source")
        if not (directory / file).is_file():
            fix = "copy all files of the model (save_pretrained writes safetensors)"
            raise CheckpointError(f"{file} is missing", where=str(directory), fix=fix)
    return [directory / file for file in files]


def tensor_makers(path: Path, *, empty: bool = False) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of one file. Raises CheckpointError when the file is damaged."""
    if path.suffix == ".bin":
        names = list(tensor_table(path, _OLD_FIX))
    else:
        try:
            with safe_open(path, framework="pt") as reader:
                names = list(reader.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"damaged safetensors file: {error}", where=str(path), fix="copy it again") from error
    return {name: partial(_read_tensor, path, name, empty) for name in names}


def _read_tensor(path: Path, name: str, empty: bool) -> Tensor:
    # A file is opened anew for each tensor: what is mapped into memory goes when the tensor is done.
    tensor: Tensor
    if path.suffix == ".bin":
        tensor = tensor_table(path, _OLD_FIX)[name]
        return torch.empty(tensor.shape, device="meta") if empty else tensor
    with safe_open(path, framework="pt") as reader:
        tensor = torch.empty(reader.get_slice(name).get_shape(), device="meta") if empty else reader.get_tensor(name)
    return tensor


def read_json(path: Path, fix: str = "copy it again") -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing", where=str(path.parent), fix=fix) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}", where=str(path), fix=fix) from error
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object, whole or not at all."""
    write_durably(path, json.dumps(content, indent=2) + "\n")


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
