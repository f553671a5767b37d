# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not end when they should are ended; those that fail are heard in their own words."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron.launch import supervisor
from megatron.launch.rank_events import Event
from megatron.launch.supervisor import Rank, Supervisor

DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); open('deaf{}', 'w').close(); time.sleep(100)"
# Tells, starts a helper that would outlive it, and fails.
FAILS = """\
import os, subprocess, sys, time
from megatron.launch.rank_events import write_failure
while not os.path.exists("deaf0"):
    time.sleep(0.01)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open("helper", "w").write(str(helper.pid))
write_failure(os.environ["NEOX_FAILURE_FILE"], "bad batch", consequence=False)
sys.exit(3)
"""


def ranks(*codes: str) -> list[Rank]:
    root = str(Path(__file__).resolve().parents[3])
    environ = {**os.environ, "PYTHONPATH": root}
    return [Rank(number=number, argv=[sys.executable, "-c", code], environment=environ) for number, code in enumerate(codes)]


def test_a_failure_ends_even_a_deaf_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "GRACE_S", 0.1)
    monkeypatch.setattr(supervisor, "LAST_S", 0.1)
    heard: list[Event] = []
    watched = Supervisor("here", heard.append)
    watched.start(ranks(DEAF.format(0), FAILS))
    deadline = time.monotonic() + 60
    while watched.alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watched.close()
    ends = {event.rank: event for event in heard if event.what != "started"}
    assert (ends[1].what, ends[1].code, ends[1].text) == ("failed", 3, "bad batch")
    assert (ends[0].what, ends[0].code) == ("stopped", -signal.SIGKILL)
    helper = int((tmp_path / "helper").read_text())
    # Gone, or a zombie that nobody has waited for.
    status = Path(f"/proc/{helper}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_rank_that_leaves_on_request_hurries_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 leaves with 75, rank 1 still writes for longer than failures are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "GRACE_S", 0.1)
    monkeypatch.setattr(supervisor, "LAST_S", 0.1)
    heard: list[Event] = []
    watched = Supervisor("here", heard.append)
    watched.start(ranks("import sys; sys.exit(75)", "import sys, time; time.sleep(1.5); sys.exit(75)"))
    while watched.alive():
        time.sleep(0.01)
    watched.close()
    assert [(event.what, event.code) for event in heard if event.what != "started"] == [("stopped", 75)] * 2


def test_a_rank_killed_from_outside_is_told_after_a_signal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heard: list[Event] = []
    watched = Supervisor("here", heard.append)
    watched.start(
        ranks("import os, signal; signal.signal(15, lambda *_: os.kill(os.getpid(), 9)); open('deaf0', 'w').close(); signal.pause()")
    )
    while not (tmp_path / "deaf0").exists():
        time.sleep(0.01)
    watched.signal(signal.SIGTERM)
    while watched.alive():
        time.sleep(0.01)
    watched.close()
    assert [(event.what, event.code) for event in heard[1:]] == [("failed", -signal.SIGKILL)]


def test_several_signals_kill_a_deaf_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heard: list[Event] = []
    watched = Supervisor("here", heard.append)
    watched.start(ranks(DEAF.format(0)))
    while not (tmp_path / "deaf0").exists():
        time.sleep(0.01)
    for _ in range(supervisor.PATIENCE):
        watched.signal(signal.SIGTERM)
        assert watched.alive()
    watched.signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while watched.alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watched.close()
    assert [(event.what, event.code) for event in heard[1:]] == [("stopped", -signal.SIGKILL)]
