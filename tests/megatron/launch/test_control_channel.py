# SPDX-License-Identifier: Apache-2.0
"""Agents of mpirun and srun on their line to the launcher: events, orders, strangers, and a line that breaks."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.launch.commands import Host, LaunchPlan
from megatron.launch.control_channel import ADDRESSES, ControlServer, connect, tell
from megatron.launch.launcher_process import run
from megatron.launch.rank_events import Event


def serve(wires: ControlServer, selector: selectors.BaseSelector, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        for key, _ in selector.select(0.05):
            wires.serve(selector, key.data)


def test_events_come_orders_go_and_a_break_is_a_loss() -> None:
    heard: list[Event] = []
    wires = ControlServer(heard.append)
    with selectors.DefaultSelector() as selector:
        wires.register(selector)
        told = wires.environment([])
        told[ADDRESSES] = f"192.0.2.1.invalid,127.0.0.1 {told[ADDRESSES].split()[-1]}"
        assert not wires.order("stop")
        agents = [connect(told, rank, f"host{rank}") for rank in (0, 1)]
        stranger = connect({**told, "NEOX_LAUNCH_SECRET": "guess"}, 2, "evil")
        assert stranger is not None and all(agents)
        first, second = (agent for agent in agents if agent)
        assert tell(first, Event(what="started", host="host0", rank=0)) and tell(stranger, Event(what="failed", host="evil", rank=2))
        serve(wires, selector, lambda: bool(heard) and wires.order("signal 15"))
        serve(wires, selector, lambda: stranger.recv(100, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b"" if _readable(stranger) else False)
        assert first.recv(100).startswith(b"signal 15\n")
        tell(first, Event(what="ended", host="host0", rank=0))
        first.close()
        second.close()
        serve(wires, selector, lambda: len(heard) >= 3)
    assert {(event.what, event.rank) for event in heard} == {("started", 0), ("ended", 0), ("lost", 1)}
    wires.close()
    assert connect(told, 0, "host0") is None


def _readable(connection: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


# Stands in for mpirun: starts two agents with the places it would give them, and ends as soon as one of them does.
MPIRUN = """\
import os, subprocess, sys, time
def start(rank):
    names = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_SIZE": 2}
    command = [sys.executable, "-u", "-m", "megatron.launch.agent", "--task", *sys.argv[1:]]
    return subprocess.Popen(command, env={**os.environ, **{name: str(value) for name, value in names.items()}})
tasks = [start(rank) for rank in range(2)]
while not any(task.poll() for task in tasks) and any(task.poll() is None for task in tasks):
    time.sleep(0.05)
for task in tasks:
    task.kill()
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.mark.parametrize(("mode", "status", "told"), [("fine", 0, ""), ("kill", 137, "rank 1 on {}"), ("watcher", 1, "rank 1 on {}")])
def test_a_launcher_that_says_nothing_about_its_ranks(tmp_path: Path, mode: str, status: int, told: str) -> None:
    worker = f"import os, time, sys; r = os.environ['RANK']; mode = {mode!r}\n"
    worker += "if mode != 'fine' and r == '1': os.kill(os.getpid() if mode == 'kill' else os.getppid(), 9)\n"
    worker += "if mode != 'fine': time.sleep(100)\n"
    worker += "open(f'rank{r}', 'w').write(os.environ['MASTER_PORT'])"
    (tmp_path / "mpirun.py").write_text(MPIRUN)
    hosts = (Host(name="localhost", slots=(0, 1), first=0),)
    words = (sys.executable, "-u", "-c", worker)
    argv = (sys.executable, str(tmp_path / "mpirun.py"), *words)
    plan = LaunchPlan(launcher="openmpi", hosts=hosts, worker=words, argv=argv, master_addr="127.0.0.1", master_port=1)
    os.chdir(tmp_path)
    reports: list[str] = []
    begin = time.monotonic()
    root = str(Path(__file__).resolve().parents[3])
    assert run(plan, {**os.environ, "PYTHONPATH": root, "MASTER_PORT": "77"}, told=reports.append) == status
    assert time.monotonic() - begin < 30
    if mode == "fine":
        assert not reports and {(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)} == {"77"}
    else:
        # Where the watcher was killed, rank 0's was too, by mpirun, and nothing tells that from the loss of a host.
        assert reports[0].startswith(told.format(socket.gethostname())), reports
