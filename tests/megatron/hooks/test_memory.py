# SPDX-License-Identifier: Apache-2.0
"""When device memory is recorded and where it is written. The recording itself is torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.hooks.profiling import MemoryHook
from support.fake_engine import FakeEngine, drive, result


def test_a_cpu_has_nothing_to_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory of CUDA devices, and this run is on cpu"):
        drive([MemoryHook(stop=2, directory=tmp_path)], [result()])
    assert list(tmp_path.iterdir()) == []


def test_one_snapshot_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the window, or of a shorter run, or when the run fails: once, with recording switched off again."""
    import torch

    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", **more: calls.append(enabled))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    engine = FakeEngine(device=torch.device("cuda"))
    for name, steps in (("window", 4), ("short", 1)):
        drive([MemoryHook(stop=2, directory=tmp_path / name)], [result()] * steps, engine=engine)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["mem_snapshot_rank0.pickle"]
        assert calls == ["all", None]
        calls.clear()

    class Failing(MemoryHook):
        def after_step(self, *args: Any) -> Any:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        drive([Failing(stop=2, directory=tmp_path / "failed")], [result()], engine=engine)
    assert (tmp_path / "failed" / "mem_snapshot_rank0.pickle").read_bytes() == b"snapshot"


@pytest.mark.gpu
def test_a_real_snapshot(tmp_path: Path) -> None:
    """torch writes a file that holds the allocations of the window."""
    import pickle

    import torch

    engine = FakeEngine(device=torch.device("cuda"))
    hook = MemoryHook(stop=1, directory=tmp_path)
    from megatron.hooks.base import TrainState

    hook.on_start(TrainState(), engine)
    kept = torch.zeros(1 << 20, device="cuda")
    hook.after_step(TrainState(iteration=1), result(), engine)
    snapshot = pickle.loads((tmp_path / "mem_snapshot_rank0.pickle").read_bytes())
    assert any(event["size"] >= kept.numel() * 4 for trace in snapshot["device_traces"] for event in trace)
