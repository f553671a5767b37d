# SPDX-License-Identifier: Apache-2.0
"""Tensors on their way to disk: copied to host memory, written one after another."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron.checkpoint.formats.torch_file import read_torch_file
from megatron.errors import CheckpointError


def tensors_in(state: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


def host_copy(state: Any, *, whole: bool) -> Any:
    """The same state with its tensors in host memory; tensors that share memory still share it, so the same file comes of it.

    whole: also copy what is in host memory already (tensors and everything else), so that the copy stays as it is
    """
    storages: dict[int, torch.UntypedStorage] = {}
    memo: dict[int, Any] = {}
    for tensor in tensors_in(state):
        if id(tensor) not in memo and (whole or tensor.device.type != "cpu"):
            memo[id(tensor)] = _on_host(tensor, storages)
    if not memo and not whole:
        return state
    if not whole:
        memo |= {id(tensor): tensor for tensor in tensors_in(state) if id(tensor) not in memo}
    if any(tensor.is_cuda for tensor in tensors_in(state)):
        torch.cuda.synchronize()  # the copies below were only asked for
    return copy.deepcopy(state, memo)


def _on_host(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A tensor over a copy of its memory, which is copied once however many tensors look at it."""
    original = tensor.untyped_storage()
    if original._cdata not in storages:
        pinned = tensor.is_cuda
        flat = torch.empty(original.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        flat.copy_(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(original), non_blocking=pinned)
        storages[original._cdata] = flat.untyped_storage()
    same = torch.empty(0, dtype=tensor.dtype).set_(storages[original._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
    # What a file also tells of a tensor.
    same = (
        torch.nn.Parameter(same, tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter)
        else same.requires_grad_(tensor.requires_grad)
    )
    same.__dict__.update(tensor.__dict__)
    return same


@dataclass(frozen=True, kw_only=True)
class Later:
    """Stands for a tensor in what is to be written; `make` gives it, of this shape."""

    shape: Sequence[int]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def save_streaming(content: Any, path: Path) -> None:
    """Write nested dicts, lists and tuples of plain data, tensors and `Later`; on disk when this returns.

    Tensors are made in the order in which they stand in `content`, and let go when they are written.
    """
    for _ in streaming(content, path):
        pass


def streaming(content: Any, path: Path, *, plain: bool = False) -> Iterator[None]:
    """The same a tensor at a time, so that several files can be written in step.

    plain: there is nothing of DeepSpeed in it, which then need not be imported
    """
    makers: list[Callable[[], Tensor]] = []
    # A file with room for every tensor, which says where each of them belongs, and then the tensors.
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(_outline(content, makers, FakeTensorMode()), path)
    with FakeTensorMode():
        places = list(_places(read_torch_file(path, deepspeed_types=not plain)))
    if len(places) != len(makers):
        raise CheckpointError(f"{len(makers)} tensors were to be written, and there is room for {len(places)}", where=str(path))
    with path.open("r+b") as file:
        for place, make in zip(places, makers, strict=True):
            _write(file, place, make())
            yield
        file.flush()
        os.fsync(file.fileno())


def _outline(content: Any, makers: list[Callable[[], Tensor]], mode: FakeTensorMode) -> Any:
    if isinstance(content, (Tensor, Later)):
        makers.append(content.make if isinstance(content, Later) else content.detach)
        with mode:
            return torch.empty(tuple(content.shape), dtype=content.dtype)
    if isinstance(content, Mapping):
        return {key: _outline(value, makers, mode) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_outline(value, makers, mode) for value in content)
    return content


def _places(content: Any) -> Iterator[FakeTensor]:
    if isinstance(content, FakeTensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _places(value)
    elif type(content) in (list, tuple):
        for value in content:
            yield from _places(value)


def _write(file: BinaryIO, place: FakeTensor, tensor: Tensor) -> None:
    if tensor.shape != place.shape:
        raise CheckpointError(f"a tensor of shape {tuple(place.shape)} was to be written, and it is {tuple(tensor.shape)}")
    if tensor.numel():
        offset: Any = place.untyped_storage()._checkpoint_offset
        file.seek(int(offset))
        whole = tensor.detach().to(place.dtype).cpu().contiguous()
        file.write(whole.reshape(-1).view(torch.uint8).numpy().data)
