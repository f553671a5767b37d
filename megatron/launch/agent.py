# SPDX-License-Identifier: Apache-2.0
"""The watcher of ranks on another machine, started by ssh, mpirun or srun. Tells the launcher what happens.

python -m megatron.launch.agent                      the ranks of a host, described on stdin (see ssh_agent.py)
python -m megatron.launch.agent --task ARGV...       one rank, whose place mpirun or srun has put into the environment
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from megatron.errors import ConfigError
from megatron.launch.control_channel import connect, tell
from megatron.launch.environment import PRIVATE, Seat, machine_environment, place_from
from megatron.launch.rank_events import LEAVING, Event, lines_of, shell_status
from megatron.launch.supervisor import POLL_S, Rank, Supervisor, host_ranks

TASK = "--task"
FALLBACK_PORT = 29500
STDIN = 0


class Agent:
    """Ranks under a Supervisor; its events go to the launcher, and the launcher's orders to it.

    orders: descriptor on which lines `signal N` and `stop` come, and whose end means that nobody is left to report to
    wire:   the connection that carries events; without one they are marked lines on stderr
    """

    def __init__(self, host: str, *, orphan: signal.Signals, orders: int | None = None, wire: socket.socket | None = None) -> None:
        self.host = host
        self.code = 0
        self._count = 0
        self._orders = orders
        self._wire = wire
        self._received: list[int] = []
        self._ranks: tuple[int, ...] = ()
        self._supervisor = Supervisor(host, self.tell, orphan=orphan)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, self._receive)

    def tell(self, event: Event) -> None:
        """Pass an event on. The first rank that did not end in order gives the exit status.

        One that stopped on request does not: mpirun and srun would kill the others for it, in the midst of their saves.
        """
        leaving = event.what == "stopped" and event.code in LEAVING
        if event.what in ("failed", "stopped") and not leaving and self.code == 0:
            self.code = shell_status(event.code)
        if self._wire is not None and tell(self._wire, event):
            return
        self._count += 1
        text = "".join(f"{line}\n" for line in lines_of(event, f"{self.host}.{os.getpid()}.{self._count}"))
        try:
            os.write(2, text.encode())
        except OSError:  # nobody listens any more
            return

    def run(self, ranks: list[Rank]) -> int:
        """Until every rank has ended; the exit status."""
        self._ranks = tuple(rank.number for rank in ranks)
        try:
            self._supervisor.start(ranks, stdin=subprocess.DEVNULL)
            while self._supervisor.alive():
                for signum in self._received:
                    self._supervisor.signal(signum)
                self._received.clear()
                if self._orders is None:
                    time.sleep(POLL_S)
                else:
                    self._obey(self._orders)
        finally:
            self._supervisor.close()
        return self.code

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signum)

    def _obey(self, orders: int) -> None:
        """Wait a moment for orders."""
        ready, _, _ = select.select([orders], [], [], POLL_S)
        if not ready:
            return
        try:
            text = os.read(orders, 4096).decode()
        except OSError:
            text = ""
        for line in text.splitlines():
            word, _, number = line.partition(" ")
            if word == "signal" and number.isdecimal():
                self._supervisor.signal(int(number))
            elif word == "stop":
                self._supervisor.stop()
        if not text:
            self._orders = self._wire = None
            self._supervisor.stop()
            for rank in self._ranks:
                text = "stopped: the connection to the launcher broke"
                self.tell(Event(what="failed", host=self.host, rank=rank, at=time.time(), code=1, text=text, consequence=True))


def task_rank(argv: list[str], environ: dict[str, str]) -> Rank:
    """The one rank of this task, with its place under the names that torch and DeepSpeed read."""
    # This task was started by mpirun or srun: an outer launcher's RANK is not about it.
    outer = {name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") if name in environ}
    inner = {name: value for name, value in environ.items() if name not in outer}
    place = place_from(inner)
    local_size = _local_size(inner, place.world_size)
    seat = Seat(
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        local_size=local_size,
        master_addr=place.master_addr,
        master_port=place.master_port or FALLBACK_PORT,
    )
    # Which host this is among how many is not told, and nothing needs it here.
    places = {name: value for name, value in seat.environment().items() if not name.startswith("CROSS_")}
    base = {**inner, **machine_environment(inner, local_size)}
    return Rank(number=place.rank, argv=argv, environment={**base, **places})


def _local_size(environ: dict[str, str], world_size: int) -> int:
    """Ranks on this host. srun tells `2(x3),1`: per node, in order."""
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = part.partition("(x")
        if count.isdecimal():
            counts += [int(count)] * int(times.rstrip(")") or 1)
    node = environ.get("SLURM_NODEID", "0")
    if counts and node.isdecimal() and int(node) < len(counts):
        return counts[int(node)]
    return world_size


def _first_line() -> bytes:
    """The task; unbuffered, as orders are read from the descriptor itself."""
    with open(STDIN, "rb", buffering=0, closefd=False) as stream:
        return stream.readline()


def main(argv: list[str]) -> int:
    """Run one host's ranks, or one task."""
    environ = dict(os.environ)
    if argv[:1] == [TASK]:
        return _run_task(argv[1:], environ)
    told = json.loads(_first_line())
    agent = Agent(told["host"], orphan=signal.SIGTERM, orders=STDIN)
    os.chdir(told["folder"])
    return agent.run(host_ranks(told, environ))


def _run_task(argv: list[str], environ: dict[str, str]) -> int:
    host = socket.gethostname()
    # mpirun may kill this process at any time; its rank must not stay behind.
    orphan = signal.SIGKILL
    inner = {name: value for name, value in environ.items() if name not in PRIVATE or name == "CUDA_VISIBLE_DEVICES"}
    try:
        rank = task_rank(argv, inner)
    except ConfigError as error:
        event = Event(what="failed", host=host, rank=0, at=time.time(), code=error.exit_code, text=error.report())
        Agent(host, orphan=orphan).tell(event)
        return error.exit_code
    wire = connect(environ, rank.number, host)
    return Agent(host, orphan=orphan, orders=None if wire is None else wire.fileno(), wire=wire).run([rank])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
