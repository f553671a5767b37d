# SPDX-License-Identifier: Apache-2.0
"""Tensors from one pipeline stage to the next, and from the last one to all; without gradients. Shapes and dtypes travel with them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.groups import Group

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
_HEADER = 10  # dtype, number of dimensions, sizes


def send_to_next(x: Tensor, group: Group) -> None:
    """Send x to the stage after this one."""
    after = group.ranks[group.rank + 1]
    dist.send(_header(x, x.device), after, group=group.handle)
    dist.send(x.contiguous(), after, group=group.handle)


def receive_from_previous(group: Group, device: torch.device) -> Tensor:
    """What the stage before this one sent."""
    before = group.ranks[group.rank - 1]
    header = torch.empty(_HEADER, dtype=torch.int64, device=device)
    dist.recv(header, before, group=group.handle)
    x = _empty(header, device)
    dist.recv(x, before, group=group.handle)
    return x


def from_last(x: Tensor | None, group: Group, device: torch.device) -> Tensor:
    """The last stage's x on all stages; the others give None."""
    if group.size == 1:
        assert x is not None
        return x
    header = torch.empty(_HEADER, dtype=torch.int64, device=device) if x is None else _header(x, device)
    dist.broadcast(header, group.ranks[-1], group=group.handle)
    x = _empty(header, device) if x is None else x.contiguous()
    dist.broadcast(x, group.ranks[-1], group=group.handle)
    return x


def _header(x: Tensor, device: torch.device) -> Tensor:
    sizes = [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    return torch.tensor(sizes + [0] * (_HEADER - len(sizes)), dtype=torch.int64, device=device)


def _empty(header: Tensor, device: torch.device) -> Tensor:
    kind, dims, *sizes = header.tolist()
    return torch.empty(sizes[:dims], dtype=_DTYPES[kind], device=device)
