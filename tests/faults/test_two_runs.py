# SPDX-License-Identifier: Apache-2.0
"""Two runs want one folder: one of them gets it, and a lock that a dead run left is no obstacle. (F27)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron.checkpoint.steps import run_lock as module
from megatron.checkpoint.steps.run_lock import LOCK, Holder, RunLock, acquire, held, this_process
from megatron.checkpoint.steps.step_dirs import saved_steps
from megatron.errors import ConfigError, TrainingError
from support.checkpoints import flip
from support.jobs import Job, settings
from support.tree import ROOT

RACERS = 6
RACE = """
import sys, time
from pathlib import Path
from megatron.checkpoint.steps.run_lock import held
from megatron.errors import ConfigError
print("ready", flush=True)
folder, start = Path(sys.argv[1]), float(sys.stdin.readline())
while time.time() < start:
    pass
try:
    with held(folder):
        print("held", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(error.what, flush=True)
"""


def write_lock(folder: Path, holder: Holder, age_s: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    os.utime(folder / LOCK, (time.time() - age_s,) * 2)


def gone() -> Holder:
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return replace(this_process(), pid=child.pid, token="dead")


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.timeout(110)
@pytest.mark.parametrize("stale", [False, True], ids=["no lock", "a dead run's lock"])
def test_of_runs_that_start_together_one_wins(tmp_path: Path, stale: bool) -> None:
    if stale:
        write_lock(tmp_path, gone())
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(RACERS)
    ]
    try:
        assert {line_of(racer) for racer in racers} == {"ready"}
        start = time.time() + 0.2
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(f"{start}\n")
            racer.stdin.flush()
        said = [line_of(racer) for racer in racers]
    finally:
        for racer in racers:
            racer.communicate("", timeout=60)
    assert said.count("held") == 1, said
    assert all(line == "held" or line.startswith("another run writes to this folder: process ") for line in said), said
    assert list(tmp_path.iterdir()) == []


def test_a_lock_names_its_holder_and_is_released(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"), held(tmp_path / "new" / "run"):
        with pytest.raises(ConfigError) as refused:
            acquire(tmp_path / "new" / "run")
        assert f"process {os.getpid()} on {os.uname().nodename}, since 20" in refused.value.what
        assert refused.value.where == str(tmp_path / "new/run" / LOCK) and "another `save`" in str(refused.value.fix)
        raise RuntimeError("out of luck")
    assert not (tmp_path / "new" / "run").exists()
    with held(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_locks_of_the_dead_are_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that is gone, one not yet waited for, a number that another process has by now, another host that fell silent."""
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    while f"{zombie.pid} (" in (stat := Path(f"/proc/{zombie.pid}/stat").read_text()) and ") Z " not in stat:
        time.sleep(0.01)
    me = this_process()
    elsewhere = replace(me, host="elsewhere", token="there")
    assert me.started is not None
    dead = [
        (gone(), 0.0),
        (replace(me, pid=zombie.pid, token="zombie"), 0.0),
        (replace(me, started=me.started - 1, token="reused"), 0.0),
        (elsewhere, module.STALE_AFTER_S + 5),
        (replace(me, place="before the reboot", token="rebooted"), module.STALE_AFTER_S + 5),
    ]
    for holder, age_s in dead:
        write_lock(tmp_path, holder, age_s)
        caplog.clear()
        with held(tmp_path):
            assert f"took over {tmp_path / LOCK}" in caplog.text and holder.host in caplog.text
        assert list(tmp_path.iterdir()) == []
    zombie.wait()
    for holder in (elsewhere, replace(me, place="other boot"), replace(elsewhere, job="7")):
        write_lock(tmp_path, holder, module.STALE_AFTER_S - 60)
        with pytest.raises(ConfigError, match="another run writes"):
            acquire(tmp_path)


def test_a_requeued_job_does_not_wait_for_its_earlier_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose node may have vanished a moment ago."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = replace(this_process(), host="elsewhere", token="before")
    write_lock(tmp_path, before)
    with pytest.raises(ConfigError, match="another run writes"):
        acquire(tmp_path)  # another part of the same life
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with held(tmp_path) as lock:
        assert (lock.holder.job, lock.holder.restarts) == ("7", 1)
        write_lock(tmp_path / "other", replace(before, job="8"))
        with pytest.raises(ConfigError, match="another run writes"):
            acquire(tmp_path / "other")


def test_a_lock_taken_in_between_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run takes over the dead one's lock after this one has looked at it, and before it renames it."""
    write_lock(tmp_path, gone())
    living, true = replace(this_process(), token="living"), Path.rename

    def rename(self: Path, target: Path) -> Path:
        write_lock(tmp_path, living)
        return true(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ConfigError, match="another run writes"):
        acquire(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "living" and len(list(tmp_path.iterdir())) == 1


def test_an_unreadable_lock_is_waited_for_and_then_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).touch()
    monkeypatch.setattr(module, "_HALF_WRITTEN_S", 0.2)
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    with held(tmp_path), pytest.raises(ConfigError, match="another run writes"):
        acquire(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_kept_fresh_and_its_loss_is_noticed(tmp_path: Path) -> None:
    write_lock(tmp_path, holder := this_process(), age_s=100)
    lock = RunLock(tmp_path / LOCK, holder, every_s=0.02)
    deadline = time.monotonic() + 20
    while time.time() - (tmp_path / LOCK).stat().st_mtime > 50:
        assert time.monotonic() < deadline
    lock.check()
    write_lock(tmp_path, replace(holder, host="elsewhere", token="other"))
    with pytest.raises(TrainingError, match="took over the folder.* on elsewhere"):
        while time.monotonic() < deadline:
            lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists()  # it is the other run's


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        acquire(tmp_path / "file" / "run")


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_second_run_is_refused_and_a_killed_one_succeeded(tmp_path: Path, world: int) -> None:
    """The successor also finds the newest checkpoint damaged, and makes the steps behind the one before again, to the last bit."""
    config = settings(tmp_path, world, train_iters=3, checkpoint_factor=1)
    first = Job(tmp_path / "a", config, faults=[{"site": "step", "step": 3, "action": "sleep", "value": 600}], launched=False)
    first.until("saved checkpoint at iteration       2", 120)
    losses = first.losses()
    second = Job(tmp_path / "b", config, launched=False)
    assert second.wait(120) == ConfigError.exit_code
    assert f"process {first.pids()[0]} on" in second.output and "another `save`" in second.output
    assert (first.save / LOCK).exists()
    first.kill()
    flip(first.save / "global_step2" / "mp_rank_00_model_states.pt")
    third = Job(tmp_path / "c", config, launched=False)
    assert third.wait(120) == 0, third.output[-3000:]
    assert "took over" in third.output and "mp_rank_00_model_states.pt: content differs" in third.output
    assert "starting from iteration 1" in third.output and {**third.losses(), **losses} == third.losses()
    assert saved_steps(first.save) == [1, 2, 3] and (first.save / "global_step2.corrupt").is_dir()
    assert not (first.save / LOCK).exists()
