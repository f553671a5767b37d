# SPDX-License-Identifier: Apache-2.0
"""Launcher programs: what they print comes through as it is, and one that is missing or fails by itself is told."""

from __future__ import annotations

import os
import sys

import pytest

from megatron.errors import BackendError
from megatron.launch.commands import Host, LaunchPlan
from megatron.launch.launcher_process import run
from megatron.launch.rank_events import Event, lines_of


def plan(*argv: str) -> LaunchPlan:
    hosts = (Host(name="hosta", slots=(0,), first=0), Host(name="hostb", slots=(0,), first=1))
    return LaunchPlan(launcher="pdsh", hosts=hosts, worker=("python", "train.py"), argv=argv, master_addr="hosta", master_port=1)


def test_a_missing_launcher_is_told() -> None:
    with pytest.raises(BackendError, match="no-such-pdsh is not installed") as caught:
        run(plan("no-such-pdsh"), os.environ, told=print)
    assert "pdsh" in (caught.value.fix or "")


def test_output_comes_through_and_events_do_not(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (line,) = lines_of(Event(what="failed", host="hostb", rank=1, at=1.0, code=3, text="bad batch"), "s")
    code = (
        f"import sys; sys.stderr.write('10%\\\\r20%\\\\r'); sys.stderr.write('hostb: {line}' + chr(10)); print('out', end=''); sys.exit(1)"
    )
    reports: list[str] = []
    assert run(plan(sys.executable, "-c", code.replace("\\\\r", "\\r")), os.environ, told=reports.append) == 3
    out, err = capfdbinary.readouterr()
    assert (out, err) == (b"out", b"10%\r20%\r")
    assert reports == ["rank 1 on hostb failed first:\nbad batch"]


def test_a_launcher_that_fails_by_itself_gives_its_status() -> None:
    assert run(plan(sys.executable, "-c", "raise SystemExit(9)"), os.environ, told=print) == 9
