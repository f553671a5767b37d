# SPDX-License-Identifier: Apache-2.0
"""Which of the ranks that no longer move is the cause: by their stacks, by silence, and by who is furthest behind."""

from __future__ import annotations

from traceback import FrameSummary
from typing import Any

import pytest

from megatron.launch.heartbeat import Seen, Standing, causes, standing_of

LOOP = FrameSummary("/x/megatron/training.py", 1, "train", lookup_line=False, line="result = engine.train_step()")
SUM = FrameSummary(
    "/x/megatron/mpu/comm.py", 34, "all_reduce", lookup_line=False, line="done = torch.ops._c10d_functional.wait_tensor(out)"
)
GATHER = FrameSummary("/v/torch/distributed/distributed_c10d.py", 9, "all_gather", lookup_line=False, line="work.wait()")
PIPE = FrameSummary("/v/deepspeed/runtime/pipe/p2p.py", 9, "recv", lookup_line=False, line="dist.recv()")
SLEEP = FrameSummary("/x/megatron/fault_injection.py", 81, "point", lookup_line=False, line="time.sleep(600)")
DEVICE = FrameSummary("/x/megatron/engine/engine.py", 5, "train_step", lookup_line=False, line="loss = loss.item()")
BACKWARD = FrameSummary(
    "/v/torch/autograd/graph.py", 5, "_engine_run_backward", lookup_line=False, line="return Variable._execution_engine.run_backward("
)


@pytest.mark.parametrize(
    ("frames", "standing", "place"),
    [
        ([LOOP, SUM], Standing.WAITING, "train (/x/megatron/training.py:1)"),
        ([LOOP, GATHER], Standing.WAITING, "train"),
        ([LOOP, PIPE], Standing.WAITING, "train"),
        ([LOOP, SLEEP], Standing.BUSY, "point (/x/megatron/fault_injection.py:81)"),
        ([LOOP, DEVICE], Standing.UNCLEAR, "train_step"),
        ([LOOP, BACKWARD], Standing.UNCLEAR, "train"),
        ([LOOP, BACKWARD, GATHER], Standing.WAITING, "train"),
        ([], Standing.UNCLEAR, ""),
    ],
)
def test_a_stack_tells_whether_a_rank_waits(frames: list[Any], standing: Standing, place: str) -> None:
    found, where = standing_of(frames)
    assert found is standing and where.startswith(place)


def seen(rank: int, standing: Standing, step: int = 3, moves: int = 10) -> Seen:
    return Seen(rank=rank, host="a", step=step, phase="step", moves=moves, idle_s=9.0, standing=standing)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([seen(0, Standing.WAITING), seen(1, Standing.BUSY), seen(2, Standing.WAITING)], [1]),
        ([seen(0, Standing.BUSY), seen(1, Standing.SILENT)], [1]),
        ([seen(0, Standing.WAITING), seen(1, Standing.UNCLEAR)], [1]),
        ([seen(0, Standing.WAITING, step=4), seen(1, Standing.WAITING)], [1]),
        ([seen(0, Standing.WAITING, moves=9), seen(1, Standing.WAITING)], [0]),
        ([seen(0, Standing.WAITING), seen(1, Standing.WAITING)], [0, 1]),
        ([], []),
    ],
)
def test_the_cause_is_who_is_not_heard_or_busy_or_behind(ranks: list[Seen], expected: list[int]) -> None:
    assert [rank.rank for rank in causes(ranks)] == expected
