# SPDX-License-Identifier: Apache-2.0
"""Runs a LaunchPlan to its end, with ranks as own children or a launcher program; when a rank dies, ends the others and reports it."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron.errors import BackendError
from megatron.launch.agent import FOLDER, ORDERS_FILE, PLAN_FILE
from megatron.launch.commands import LaunchPlan
from megatron.launch.control_channel import ControlServer
from megatron.launch.environment import PRIVATE
from megatron.launch.rank_events import MARK, SIGNALLED, Event, Lines, RankEvents, shell_status
from megatron.launch.signals import HANDED_ON, noting_signals
from megatron.launch.supervisor import (
    GRACE_S,
    LAST_S,
    PATIENCE,
    PATIENT_LAST_S,
    POLL_S,
    Supervisor,
    dying_with_parent,
    host_ranks,
    signal_group,
)

# Agents have this much longer than ranks of this machine to end what is theirs before the launcher is told to.
AGENT_GRACE_S = GRACE_S + 1.0
# From a launcher's SIGTERM to its SIGKILL.
LAUNCHER_LAST_S = 3.0
# After the launcher's end, what it left in the pipes is read for no longer.
DRAIN_S = 2.0
# MPICH 4.0's Hydra does not hand on the last variable of its environment: this one may be lost.
HYDRA_END = "NEOX_LAUNCH_END"
INSTALL = {
    "pdsh": "install pdsh (with its exec module: pdsh-rcmd-exec on Red Hat)",
    "openmpi": "install Open MPI, or load its module",
    "mpich": "install MPICH, or load its module",
    "slurm": "load SLURM's commands into PATH",
}


class LauncherProcess:
    """One launcher program and the agents behind it.

    rank_events:   takes the events
    received: signals to this process, appended to by their handler
    """

    def __init__(self, plan: LaunchPlan, environ: Mapping[str, str], rank_events: RankEvents, received: list[int]) -> None:
        self.plan = plan
        self.rank_events = rank_events
        self.received = received
        self.environ = {**environ, **plan.env}
        self.folder = Path(tempfile.mkdtemp(prefix="neox-launch-")) if plan.launcher == "pdsh" else None
        self.control = ControlServer(rank_events.note) if plan.launcher in ("openmpi", "mpich", "slurm") else None
        self._lines = Lines()
        self._partial: dict[int, bytes] = {}
        self._handled = 0
        self._stop_at: float | None = None
        self._end_at: float | None = None
        self._endings = [signal.SIGTERM, signal.SIGKILL]

    def run(self) -> int:
        """To the launcher's end; its exit status as subprocess gives it."""
        try:
            if self.folder:
                _write_plan(self.plan, self.folder)
                self.environ[FOLDER] = str(self.folder)
            if self.control:
                self.environ |= self.control.environment([host.name for host in self.plan.hosts])
            if self.plan.launcher == "mpich":
                self.environ |= {HYDRA_END: "1"}
            return self._attend(self._start())
        finally:
            if self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)
            if self.control:
                self.control.close()

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self.plan.argv,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # A session of its own: a Ctrl-C at the terminal reaches the ranks once, through us.
                start_new_session=True,
                preexec_fn=dying_with_parent(signal.SIGTERM),
            )
        except FileNotFoundError:
            fix = INSTALL.get(self.plan.launcher, "install it")
            raise BackendError(f"{self.plan.argv[0]} is not installed here", where="launcher", fix=fix) from None

    def _attend(self, process: subprocess.Popen[bytes]) -> int:
        ended_at: float | None = None
        outs = {process.stdout: sys.stdout.buffer, process.stderr: sys.stderr.buffer}
        with selectors.DefaultSelector() as selector:
            for stream in outs:
                if stream is not None:
                    selector.register(stream, selectors.EVENT_READ)
            if self.control:
                self.control.register(selector)
            while True:
                for key, _ in selector.select(POLL_S):
                    if key.fileobj not in outs:
                        if self.control:
                            self.control.serve(selector, key.data)
                        continue
                    data = os.read(key.fd, 1 << 16)
                    self._pass_on(key.fd, data, outs[key.fileobj])
                    if not data:
                        selector.unregister(key.fileobj)
                open_streams = any(stream in selector.get_map() for stream in outs)
                if not open_streams and not self.control:
                    time.sleep(POLL_S)
                now = time.monotonic()
                self._direct(process, now)
                if process.poll() is not None:
                    # A process that it left behind may hold the pipes open.
                    ended_at = ended_at or now
                    if now > ended_at + DRAIN_S or not open_streams:
                        return process.wait()

    def _direct(self, process: subprocess.Popen[bytes], now: float) -> None:
        """Hand on new signals; after a failure, have everything end in time."""
        for signum in self.received[self._handled :]:
            self._handled += 1
            self._order(process, f"signal {int(signum)}")
            if self._handled > PATIENCE:
                self._end_at = now
        if self._stop_at is None and (failures := self.rank_events.failures()):
            # Of a lost host nothing more will be heard.
            self._stop_at = now + (AGENT_GRACE_S if failures[0].what == "failed" else 0.0)
        if self._stop_at is not None and self._end_at is None and now >= self._stop_at:
            self._end_at = now + (PATIENT_LAST_S if self._handled else LAST_S) + 1.0
            self._order(process, "stop")
        if self._end_at is not None and now >= self._end_at and self._endings:
            signal_group(process, self._endings.pop(0))
            self._end_at = now + LAUNCHER_LAST_S

    def _order(self, process: subprocess.Popen[bytes], line: str) -> None:
        """Tell the agents; a launcher without agents of ours gets SIGTERM, whatever the order."""
        if self.folder:
            with open(self.folder / ORDERS_FILE, "a", encoding="utf-8") as orders:
                orders.write(line + "\n")
        elif self.control and self.control.order(line):
            return
        elif process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def _pass_on(self, fd: int, data: bytes, out: BinaryIO) -> None:
        """Whole lines to `out`, events to `rank_events`. data: empty at the end of the stream"""
        *whole, rest = (self._partial.get(fd, b"") + data).split(b"\n")
        pieces = [line + b"\n" for line in whole]
        # A progress bar ends its lines with \r; at the end of the stream, what is left is a line too.
        cut = rest.rfind(b"\r") + 1 if data else len(rest)
        if cut and not (data and MARK.encode() in rest):
            pieces.append(rest[:cut])
            rest = rest[cut:]
        self._partial[fd] = rest
        for line in pieces:
            # A progress bar may stand before an event on the same line.
            mark = line.find(MARK.encode())
            before = line.rfind(b"\r", 0, mark) + 1 if mark > 0 else 0
            out.write(line[:before])
            piece = line[before:]
            taken = self._lines.take(piece.decode(errors="replace"))
            if isinstance(taken, Event):
                self.rank_events.note(taken)
            elif taken is not None:
                out.write(piece)
        out.flush()


def _write_plan(plan: LaunchPlan, folder: Path) -> None:
    """What `agent --ssh` tells each host's agent; secret values stay in the environment."""
    environment = dict(plan.handed_on) | {name: value for name, value in plan.env.items() if name not in plan.secrets}
    shared = {**_told_to_all(plan, environment), "folder": os.getcwd()}
    hosts = {host.name: _told_to_host(plan, index) for index, host in enumerate(plan.hosts)}
    (folder / PLAN_FILE).write_text(json.dumps({"all": shared, "hosts": hosts, "secrets": plan.secrets}), encoding="utf-8")


def _told_to_all(plan: LaunchPlan, environment: Mapping[str, str]) -> dict[str, Any]:
    """What `host_ranks` needs to know on every host."""
    names = ("world_size", "master_addr", "master_port")
    return {"argv": plan.worker, "environment": environment, "nodes": len(plan.hosts), **{name: getattr(plan, name) for name in names}}


def _told_to_host(plan: LaunchPlan, node: int) -> dict[str, Any]:
    """What it needs to know on one host, the `node`-th."""
    host = plan.hosts[node]
    devices = host.slots if plan.set_devices else None
    return {"first_rank": host.first, "local_size": len(host.slots), "node": node, "devices": devices}


def run(plan: LaunchPlan, environ: Mapping[str, str], *, told: Callable[[str], object]) -> int:
    """Start the plan, hand signals on to its ranks, wait, and return the exit status a shell would show.

    told: takes the report when ranks have failed
    A rank's own exit status comes through, such as 75 from ranks that were told to stop and have saved; a rank killed by signal n gives
    128 + n, and so does a signal n to us about which the ranks say nothing.
    """
    rank_events = RankEvents(plan.places())
    base = {name: value for name, value in environ.items() if name not in PRIVATE or name == "CUDA_VISIBLE_DEVICES"}
    with noting_signals(HANDED_ON) as received:
        code = _run_here(plan, base, rank_events, received) if not plan.argv else LauncherProcess(plan, base, rank_events, received).run()
    left = rank_events.left()
    rank_events.close(failed=code != 0 and not received and left is None)
    if report := rank_events.report():
        told(report)
    if any(not failure.consequence for failure in rank_events.failures()):
        return rank_events.status()
    if left is not None:
        return left
    return SIGNALLED + received[0] if received else rank_events.status() or shell_status(code)


def _run_here(plan: LaunchPlan, environ: Mapping[str, str], rank_events: RankEvents, received: list[int]) -> int:
    """The ranks as our own children."""
    (host,) = plan.hosts
    ranks = host_ranks({**_told_to_all(plan, plan.env), **_told_to_host(plan, 0)}, environ)
    Supervisor(host.name, rank_events.note).run(ranks, received, lambda: time.sleep(POLL_S))
    return 0
