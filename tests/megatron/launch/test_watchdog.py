# SPDX-License-Identifier: Apache-2.0
"""Heartbeat files, and when a watch ends a process: one that stands still, and not one that is slow, suspended or kept waiting.

Which of the ranks that no longer move is the cause: by their stacks, by silence, and by who is furthest behind.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import pytest

from megatron.launch import heartbeat, watchdog
from megatron.launch.heartbeat import SAVE, Heartbeat, RankProgress
from megatron.launch.watchdog import Standing, Watch, WatchPlan, causes, standing_of, watching

INTERVAL_S, LIMIT_S = 0.1, 1.2


class Ended:
    """Stands for the end of the process."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.happened = threading.Event()

    def __call__(self, status: int) -> None:
        self.status = status
        self.happened.set()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "AFTER_S", 0.0)
    monkeypatch.setattr(watchdog, "LATE_AT_LEAST_S", 0.6)


def plan(tmp_path: Path, **changes: Any) -> WatchPlan:
    values = {"rank": 0, "world": 1, "folder": tmp_path / "heartbeat", "interval_s": INTERVAL_S, "limit_s": LIMIT_S}
    return WatchPlan(**{**values, "note": str(tmp_path / "note"), **changes})  # type: ignore[arg-type]


def other(**changes: Any) -> Heartbeat:
    values = {"rank": 1, "host": "b", "pid": 1, "step": 5, "phase": "step", "moves": 7, "idle_s": 0.0, "limit_s": LIMIT_S, "time": 0.0}
    return Heartbeat(**{**values, **changes})


def warm() -> RankProgress:
    progress = RankProgress()
    progress.begin_step(1)
    progress.end_step()
    progress.begin_step(2)
    return progress


def record(tmp_path: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "heartbeat" / f"rank_{rank}.json").read_text())
    return found


def test_a_file_follows_the_run_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    with watching(plan(tmp_path, limit_s=None)) as progress:
        progress.begin_step(3)
        with progress.during(SAVE):
            time.sleep(3 * INTERVAL_S)
            first = record(tmp_path)
    assert (first["rank"], first["step"], first["phase"], first["pid"]) == (0, 3, "save", os.getpid())
    assert record(tmp_path)["phase"] == "ended" and abs(record(tmp_path)["time"] - time.time()) < 60
    assert not list((tmp_path / "heartbeat").glob("*.tmp*"))
    with pytest.raises(ValueError, match="on purpose"), watching(plan(tmp_path)):
        raise ValueError("on purpose")
    assert record(tmp_path)["phase"] == "failed"
    assert "verysecret" not in (tmp_path / "heartbeat" / "rank_0.json").read_text()


def test_without_folder_and_limit_there_is_no_thread() -> None:
    before = threading.active_count()
    with watching(WatchPlan(rank=0, world=1, folder=None)):
        assert threading.active_count() == before


def test_who_stands_still_is_ended_with_its_stack(tmp_path: Path) -> None:
    ended, progress = Ended(), warm()
    guard = Watch(plan(tmp_path), progress, end=ended)
    guard.start()
    began = time.monotonic()
    assert ended.happened.wait(20)  # this line is the one that hangs
    assert LIMIT_S / 2 < time.monotonic() - began < 15
    guard.stop()
    note = json.loads((tmp_path / "note").read_text())
    assert note["consequence"] is False and "stuck: rank 0 on" in note["text"] and "step 2, phase step" in note["text"]
    assert "ended.happened.wait(20)" in note["text"] and ended.status == 1


@pytest.mark.parametrize("sign", ["moves", "setup", "another rank"])
def test_who_is_slow_goes_on(tmp_path: Path, sign: str) -> None:
    """Moves within the limit; a first step, which may take three times as long; a rank that works while this one waits for it."""
    ended, progress = Ended(), RankProgress() if sign == "setup" else warm()
    guard = Watch(plan(tmp_path, world=2 if sign == "another rank" else 1), progress, end=ended)
    (tmp_path / "heartbeat").mkdir()
    guard.start()
    # Long enough for a watch that errs to have compared notes and ended it.
    for _ in range(8):
        if sign == "moves":
            progress.beat()
        if sign == "another rank":
            heartbeat.write(tmp_path / "heartbeat", other())
        assert not ended.happened.wait(LIMIT_S / 4)
    guard.stop()


def test_a_rank_that_is_not_heard_of_is_told_of_by_another(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").mkdir()
    heartbeat.write(tmp_path / "heartbeat", other())
    past = time.time() - 100
    os.utime(tmp_path / "heartbeat" / "rank_1.json", (past, past))
    ended, progress = Ended(), warm()
    guard = Watch(plan(tmp_path, world=2), progress, end=ended)
    guard.start()
    assert ended.happened.wait(20)
    guard.stop()
    note = json.loads((tmp_path / "note").read_text())
    assert (note["consequence"], note["about"]) == (False, 1)
    assert note["text"].startswith("stuck: rank 1 on b has not been heard of for 10") and "step 5, phase step" in note["text"]


def test_while_files_are_written_bytes_are_progress(tmp_path: Path) -> None:
    if not Path("/proc/self/io").exists():
        pytest.skip("needs /proc/self/io of Linux")
    guard = Watch(plan(tmp_path), warm(), end=Ended())
    guard._look(1.0)
    for phase, idle in (("save", 0.0), ("step", 1.0)):
        guard.progress.phase = phase
        (tmp_path / "large").write_bytes(bytes(2 << 20))
        guard._look(1.0)
        assert guard._idle_s == idle


# Which rank is the cause

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


def seen(rank: int, standing: Standing, step: int = 3, moves: int = 10) -> Heartbeat:
    return other(rank=rank, step=step, moves=moves, standing=standing)


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
def test_the_cause_is_who_is_not_heard_or_busy_or_behind(ranks: list[Heartbeat], expected: list[int]) -> None:
    assert [rank.rank for rank in causes(ranks)] == expected
