# SPDX-License-Identifier: Apache-2.0
"""Runs a Plan to its end: starts it, hands signals on, and when a rank dies, ends the others and reports the first."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from megatron.errors import BackendError
from megatron.launch.environment import PRIVATE, Seat, machine_environment
from megatron.launch.plan import Plan
from megatron.launch.reach import FOLDER, ORDERS_FILE, PLAN_FILE
from megatron.launch.records import MARK, SIGNALLED, Event, Ledger, Lines, shell_status
from megatron.launch.supervisor import GRACE_S, LAST_S, PATIENCE, PATIENT_LAST_S, POLL_S, Rank, Supervisor, dying_with_parent

# The agents have this much longer than ranks of this machine to end what is theirs before the launcher is told to.
AGENT_GRACE_S = GRACE_S + 1.0
# After the launcher's end, what it left in the pipes is read for no longer.
DRAIN_S = 2.0
INSTALL = {
    "pdsh": "install pdsh (with its exec module: pdsh-rcmd-exec on Red Hat)",
    "openmpi": "install Open MPI, or load its module",
    "mpich": "install MPICH, or load its module",
    "slurm": "load SLURM's commands into PATH",
}


def run(plan: Plan, environ: Mapping[str, str], *, told: Callable[[str], object]) -> int:
    """Start the plan, hand SIGINT, SIGTERM and SIGHUP on to its ranks, wait, and return the exit status a shell would show.

    told: takes the report when ranks have failed
    A rank's own exit status comes through; a rank killed by signal n, or a signal n to us, gives 128 + n.
    """
    ledger = Ledger(plan.places())
    base = {name: value for name, value in environ.items() if name not in PRIVATE or name == "CUDA_VISIBLE_DEVICES"}
    with _noting_signals() as received:
        code = _run_here(plan, base, ledger, received) if not plan.argv else _Launched(plan, base, ledger, received).run()
    ledger.close(failed=code != 0 and not received)
    if report := ledger.report():
        told(report)
    if received:
        return SIGNALLED + received[0]
    return ledger.status() or shell_status(code)


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Within, signals are only written down, in the list that is given."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(name, note) for name in names}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _run_here(plan: Plan, environ: Mapping[str, str], ledger: Ledger, received: list[int]) -> int:
    """The ranks as our own children."""
    (host,) = plan.hosts
    base = {**environ, **plan.env}
    base |= machine_environment(base, plan.world_size)
    if plan.set_devices:
        base["CUDA_VISIBLE_DEVICES"] = ",".join(str(slot) for slot in host.slots)
    meeting = {"master_addr": plan.master_addr, "master_port": plan.master_port}
    ranks = []
    for rank in range(plan.world_size):
        seat = Seat(rank=rank, local_rank=rank, world_size=plan.world_size, local_size=plan.world_size, **meeting)  # type: ignore[arg-type]
        ranks.append(Rank(number=rank, argv=plan.worker, environment={**base, **seat.environment()}))
    supervisor = Supervisor(host.name, ledger.note)
    handled = 0
    try:
        supervisor.start(ranks)
        while supervisor.alive():
            for signum in received[handled:]:
                handled += 1
                supervisor.signal(signum)
            time.sleep(POLL_S)
    finally:
        supervisor.close()
    return 0


class _Launched:
    """A launcher program, its output passed on with the events picked out, signals and orders handed to it."""

    def __init__(self, plan: Plan, environ: Mapping[str, str], ledger: Ledger, received: list[int]) -> None:
        self.plan = plan
        self.ledger = ledger
        self.received = received
        self.environ = {**environ, **plan.env}
        self.folder = Path(tempfile.mkdtemp(prefix="neox-launch-")) if plan.launcher == "pdsh" else None
        self.lines = Lines()
        self.partial: dict[int, bytes] = {}

    def run(self) -> int:
        """To the launcher's end; its exit status as subprocess gives it."""
        try:
            if self.folder:
                self._write_plan(self.folder)
                self.environ[FOLDER] = str(self.folder)
            return self._attend(self._start())
        finally:
            if self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)

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
            mend = INSTALL.get(self.plan.launcher, "install it")
            raise BackendError(f"{self.plan.argv[0]} is not installed here", where="launcher", mend=mend) from None

    def _write_plan(self, folder: Path) -> None:
        """What `reach` tells each host's agent; secret values stay in the environment."""
        plan = self.plan
        shared = {
            "argv": plan.worker,
            "environment": dict(plan.handed_on) | {name: value for name, value in plan.env.items() if name not in plan.secrets},
            "folder": os.getcwd(),
            "world_size": plan.world_size,
            "master_addr": plan.master_addr,
            "master_port": plan.master_port,
            "nodes": len(plan.hosts),
        }
        hosts = {
            host.name: {
                "first_rank": host.first,
                "local_size": len(host.slots),
                "node": index,
                "devices": host.slots if plan.set_devices else None,
            }
            for index, host in enumerate(plan.hosts)
        }
        (folder / PLAN_FILE).write_text(json.dumps({"all": shared, "hosts": hosts, "secrets": plan.secrets}), encoding="utf-8")

    def _attend(self, process: subprocess.Popen[bytes]) -> int:
        stop_at: float | None = None
        kill_at: float | None = None
        end_at: float | None = None
        handled = 0
        with selectors.DefaultSelector() as selector:
            for stream, out in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                if stream is not None:
                    selector.register(stream, selectors.EVENT_READ, out)
            while selector.get_map() or process.poll() is None:
                for key, _ in selector.select(POLL_S):
                    data = os.read(key.fd, 1 << 16)
                    self._pass_on(key.fd, data, key.data)
                    if not data:
                        selector.unregister(key.fileobj)
                if not selector.get_map():
                    time.sleep(POLL_S)
                now = time.monotonic()
                for signum in self.received[handled:]:
                    handled += 1
                    self._signal(process, signum)
                    kill_at = now if handled > PATIENCE else kill_at
                if stop_at is None and (failures := self.ledger.failures()):
                    # Of a lost host nothing more will be heard.
                    stop_at = now + (AGENT_GRACE_S if failures[0].what == "failed" else 0.0)
                if stop_at is not None and kill_at is None and now >= stop_at:
                    kill_at = now + (PATIENT_LAST_S if handled else LAST_S) + AGENT_GRACE_S
                    self._stop(process)
                if kill_at is not None and now >= kill_at:
                    _signal_group(process, signal.SIGKILL)
                if process.poll() is not None:
                    # A process it left behind may hold the pipes open.
                    end_at = end_at or now + DRAIN_S
                    if now > end_at:
                        break
        return process.wait()

    def _pass_on(self, fd: int, data: bytes, out: BinaryIO) -> None:
        """Whole lines to `out`, events to the ledger. data: empty at the end of the stream"""
        *whole, rest = (self.partial.get(fd, b"") + data).split(b"\n")
        pieces = [line + b"\n" for line in whole]
        # A progress bar ends its lines with \r; at the end of the stream, what is left is a line too.
        cut = rest.rfind(b"\r") + 1 if data else len(rest)
        if cut and not (data and MARK.encode() in rest):
            pieces.append(rest[:cut])
            rest = rest[cut:]
        self.partial[fd] = rest
        for piece in pieces:
            taken = self.lines.take(piece.decode(errors="replace"))
            if isinstance(taken, Event):
                self.ledger.note(taken)
            elif taken is not None:
                out.write(piece)
        out.flush()

    def _signal(self, process: subprocess.Popen[bytes], signum: int) -> None:
        """A user's signal: by our own channel to pdsh's agents; mpirun and srun pass SIGTERM on to every rank."""
        if self.folder:
            self._order(f"signal {int(signum)}")
        elif process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        if self.folder:
            self._order("stop")
        elif process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def _order(self, line: str) -> None:
        if self.folder:
            with open(self.folder / ORDERS_FILE, "a", encoding="utf-8") as orders:
                orders.write(line + "\n")


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        return
