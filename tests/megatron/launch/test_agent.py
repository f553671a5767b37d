# SPDX-License-Identifier: Apache-2.0
"""The one text that a remote shell gets is taken literally by it, whatever the folder is called; the agent obeys its orders."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron.launch import agent as agent_module
from megatron.launch.rank_events import Event, Lines
from support.tree import ROOT

EVIL = 'it\'s a "name"; touch pwned; $(touch pwned2) `touch pwned3` %h & *'


def test_a_shell_takes_the_folder_literally(tmp_path: Path) -> None:
    assert doctest.testmod(agent_module).failed == 0
    root = tmp_path / EVIL
    root.mkdir()
    python = root / "py thon"
    python.write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    python.chmod(0o755)
    for shell in ("sh", "bash", "dash"):
        if shutil.which(shell):
            done = subprocess.run(
                [shell, "-c", agent_module.remote_text(root, str(python))], capture_output=True, text=True, timeout=30, cwd=tmp_path
            )
            assert done.stdout.splitlines() == [str(root), "-u", "-m", "megatron.launch.agent"], done.stderr
    assert sorted(os.listdir(tmp_path)) == [EVIL] and os.listdir(root) == ["py thon"]


def agent(task: dict[str, object], orders: str = "", *, end: bool = False) -> tuple[int, str, list[Event]]:
    """Run the agent of one host on `task`, through a shell as ssh does; its exit status, output and events."""
    command = ["sh", "-c", agent_module.remote_text(ROOT, sys.executable)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    out = "".join(process.stdout.readline() for _ in range(2)) if orders or end else ""
    process.stdin.write(orders)
    process.stdin.flush()
    if end:
        process.stdin.close()
    out += process.stdout.read()
    lines = Lines()
    taken = [lines.take(line) for line in process.stderr]
    code = process.wait(timeout=60)
    process.stdin.close()
    return code, out, [event for event in taken if isinstance(event, Event)]


def task(folder: Path, code: str) -> dict[str, object]:
    """Ranks 2 and 3 of 4, on devices 4 and 6 of the second host."""
    seat = {"world_size": 4, "first_rank": 2, "local_size": 2, "master_addr": "hosta", "master_port": 1, "node": 1, "nodes": 2}
    argv = [sys.executable, "-u", "-c", code, EVIL]
    return {**seat, "argv": argv, "environment": {"HF_TOKEN": "s3cret"}, "folder": str(folder), "host": "hostb", "devices": [4, 6]}


TOLD = """\
import os, sys
told = [sys.argv[1], os.getcwd()] + [os.environ[name] for name in ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "HF_TOKEN")]
sys.stdout.write(repr(told) + chr(10))
"""
WAIT = """\
import signal, sys, time
def interrupted(*_):
    sys.stdout.write("INT ")
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGINT, interrupted)
sys.stdout.write("up" + chr(10))
time.sleep(100)
"""


def test_ranks_get_their_words_and_places(tmp_path: Path) -> None:
    code, out, events = agent(task(tmp_path, TOLD))
    assert code == 0
    assert sorted(out.splitlines()) == [repr([EVIL, str(tmp_path), str(rank), str(rank - 2), "4,6", "s3cret"]) for rank in (2, 3)]
    assert sorted((event.what, event.rank) for event in events) == [("ended", 2), ("ended", 3), ("started", 2), ("started", 3)]


def test_a_failed_rank_is_told_and_ends_the_other(tmp_path: Path) -> None:
    code, _, events = agent(task(tmp_path, "import os, time; os.environ['RANK'] == '3' and os.kill(os.getpid(), 9); time.sleep(100)"))
    assert code == 137
    ends = {event.rank: event for event in events if event.what != "started"}
    assert (ends[3].what, ends[3].code, ends[3].host) == ("failed", -9, "hostb") and ends[2].what == "stopped"


def test_orders_and_their_end(tmp_path: Path) -> None:
    code, out, _ = agent(task(tmp_path, WAIT), "signal 2\n")
    assert code == 0 and out.split() == ["up", "up", "INT", "INT"]
    # The launcher, or the way to it, is gone.
    code, out, events = agent(task(tmp_path, WAIT), end=True)
    assert code == 1 and out.split() == ["up", "up"]
    assert sorted(event.what for event in events) == ["ended", "ended", "failed", "failed", "started", "started"]
