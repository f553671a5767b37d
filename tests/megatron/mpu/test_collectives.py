# SPDX-License-Identifier: Apache-2.0
"""What one rank does for all, errors included."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from megatron.errors import CheckpointError, LostRankError
from megatron.mpu.collectives import on_every_rank, on_first_rank
from megatron.mpu.groups import Group
from support.dist import run_distributed


def bad(kind: type[Exception], rank: int) -> int:
    raise kind(f"rank {rank} cannot")


def refuse(rank: int) -> int:
    raise CheckpointError(f"rank {rank} cannot", where="there", fix="do")


def outcomes(rank: int, world: int, folder: str) -> list[object]:
    """What a rank gets, an error as its type and text."""
    import torch.distributed as dist

    group = Group(rank=rank, size=world, ranks=tuple(range(world)), handle=dist.group.WORLD)

    def attempt(how: object, call: object) -> object:
        try:
            return how(call, group)  # type: ignore[operator]
        except Exception as error:
            return type(error).__name__, str(error), getattr(error, "fix", None)

    return [
        attempt(on_first_rank, lambda: (rank, (Path(folder) / f"{rank}").write_text("called"))),
        attempt(on_first_rank, partial(refuse, rank)),
        attempt(on_first_rank, partial(bad, OSError, rank)),
        attempt(on_every_rank, lambda: 10 * rank),
        attempt(on_every_rank, lambda: refuse(rank) if rank else rank),
    ]


@pytest.mark.dist
@pytest.mark.timeout(100)
def test_every_rank_gets_the_same(tmp_path: Path) -> None:
    first, second = run_distributed(outcomes, world=2, timeout_s=80, folder=str(tmp_path))
    refused = ("CheckpointError", "rank {} cannot\n  where: there\n  fix:   do", "do")
    assert first[0] == second[0] == (0, 6) and os.listdir(tmp_path) == ["0"]
    assert first[1] == second[1] == (refused[0], refused[1].format(0), "do")
    assert first[2] == ("OSError", "rank 0 cannot", None) and second[2] == (LostRankError.__name__, "rank 0 failed: rank 0 cannot", None)
    assert first[3] == second[3] == [0, 10]
    assert first[4] == second[4] == (refused[0], refused[1].format(1), "do")


def test_alone_a_call_is_a_call() -> None:
    assert on_first_rank(lambda: 3, Group.single()) == 3 and on_every_rank(lambda: 3, Group.single()) == [3]
    with pytest.raises(OSError, match="rank 0"):
        on_first_rank(partial(bad, OSError, 0), Group.single())
