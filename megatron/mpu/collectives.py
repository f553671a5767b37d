# SPDX-License-Identifier: Apache-2.0
"""Agreement between processes: flags, values, tensors and barriers over a Group. Nothing happens when the group is one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.errors import LostRankError, NeoXError
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group

T = TypeVar("T")


def any_rank(flag: bool, group: Group, device: torch.device) -> bool:
    """Whether any rank of the group says True; the same answer on all of them."""
    return any_ranks([flag], group, device)[0]


def any_ranks(flags: Sequence[bool], group: Group, device: torch.device) -> list[bool]:
    """Of each flag, whether any rank of the group says True; the same answers on all of them."""
    if group.size == 1:
        return list(flags)
    votes = torch.tensor([int(flag) for flag in flags], dtype=torch.int32, device=device)
    return [bool(vote) for vote in all_reduce(votes, group, maximum=True).tolist()]


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    if group.size > 1:
        dist.barrier(group=group.handle)


def of_all_ranks(value: T, group: Group) -> list[T]:
    """Every rank's value (anything that can be pickled), in rank order, on all of them."""
    if group.size == 1:
        return [value]
    values: list[T] = [value] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def to_first_rank(value: T, group: Group) -> list[T]:
    """Every rank's value (anything that can be pickled), in rank order, on the group's first rank; nothing on the others."""
    if group.size == 1:
        return [value]
    values: list[T] | None = [value] * group.size if group.rank == 0 else None
    dist.gather_object(value, values, dst=group.ranks[0], group=group.handle)
    return values or []


def of_last_rank(value: T, group: Group) -> T:
    """The last rank's value (anything that can be pickled), on all of them."""
    return value if group.size == 1 else _of_rank(value, group, group.ranks[-1])


def _of_rank(value: T, group: Group, source: int, device: torch.device | None = None) -> T:
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group.handle, device=device)
    return box[0]


def on_first_rank(call: Callable[[], T], group: Group) -> T:
    """What `call` gives on the group's first rank (anything that can be pickled), on all of them. Nobody else calls it.

    Raises on every rank the NeoXError that the first one met.
    """
    if group.size == 1:
        return call()
    outcome: tuple[T | None, NeoXError | None] = (None, None)
    failure: Exception | None = None
    if group.rank == 0:
        try:
            outcome = (call(), None)
        except NeoXError as error:
            outcome = (None, error)
        except Exception as error:
            failure, outcome = error, (None, LostRankError(f"rank {group.ranks[0]} failed: {error}"))
    value, refused = _of_rank(outcome, group, group.ranks[0])
    if problem := failure or refused:
        raise problem
    return value  # type: ignore[return-value]


def on_every_rank(call: Callable[[], T], group: Group) -> list[T]:
    """What `call` gives on each rank (anything that can be pickled), in rank order, on all of them.

    Raises on every rank the NeoXError of the first rank that met one.
    """
    outcome: tuple[T | None, NeoXError | None]
    try:
        outcome = (call(), None)
    except NeoXError as error:
        outcome = (None, error)
    outcomes = of_all_ranks(outcome, group)
    for _, refused in outcomes:
        if refused is not None:
            raise refused
    return [value for value, _ in outcomes]  # type: ignore[misc]


# ---- tensors of pipeline stages, without gradients; shapes and dtypes travel with them ---------------------------


def send_to_next(x: Tensor, group: Group) -> None:
    """Send x to the stage after this one."""
    after = group.ranks[group.rank + 1]
    dist.send_object_list([(x.shape, x.dtype)], after, group=group.handle, device=x.device)
    dist.send(x.contiguous(), after, group=group.handle)


def receive_from_previous(group: Group, device: torch.device) -> Tensor:
    """What the stage before this one sent."""
    before = group.ranks[group.rank - 1]
    form: list[Any] = [None]
    dist.recv_object_list(form, before, group=group.handle, device=device)
    x = torch.empty(form[0][0], dtype=form[0][1], device=device)
    dist.recv(x, before, group=group.handle)
    return x


def from_last(x: Tensor | None, group: Group, device: torch.device) -> Tensor:
    """The last stage's x on all stages; the others give None."""
    if group.size == 1:
        assert x is not None
        return x
    form: Any = _of_rank(None if x is None else (x.shape, x.dtype), group, group.ranks[-1], device)
    x = torch.empty(form[0], dtype=form[1], device=device) if x is None else x.contiguous()
    dist.broadcast(x, group.ranks[-1], group=group.handle)
    return x
