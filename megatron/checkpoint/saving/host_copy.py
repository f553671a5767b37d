# SPDX-License-Identifier: Apache-2.0
"""A state as it is now, in host memory, so that training may go on while it is written. Knows no file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


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
