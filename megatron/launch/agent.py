# SPDX-License-Identifier: Apache-2.0
"""The watcher of ranks on another machine, started by ssh, mpirun or srun. Tells the launcher what happens.

python -m megatron.launch.agent                      the ranks of a host, described on stdin
python -m megatron.launch.agent --task ARGV...       one rank, whose place mpirun or srun has put into the environment
python -m megatron.launch.agent --ssh HOST           starts the first form on HOST and is its line to the launcher; run by pdsh

What the agent behind ssh shall do, secrets included, goes through ssh's stdin, never through a command line or a shell: the only text
that the remote shell sees is the folder of the project and the path of Python, both quoted.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launch.control_channel import connect, tell
from megatron.launch.environment import PRIVATE, machine_environment, place_from, project_folder
from megatron.launch.rank_events import LEAVING, Event, lines_of, shell_status
from megatron.launch.signals import HANDED_ON, note_signals
from megatron.launch.supervisor import LAST_S, PATIENT_LAST_S, POLL_S, Rank, Supervisor, dying_with_parent, host_ranks

TASK, SSH = "--task", "--ssh"
FALLBACK_PORT = 29500
STDIN = 0
FOLDER = "NEOX_LAUNCH_FOLDER"
PLAN_FILE, ORDERS_FILE = "plan.json", "orders"
# BatchMode: no question can be answered. ServerAlive: a host that vanished is noticed after 12 to 16 seconds.
SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=4", "ServerAliveCountMax=3")
SSH_FAILED = 255


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
        self._ranks: tuple[int, ...] = ()
        self._supervisor = Supervisor(host, self.tell, orphan=orphan)
        self._received = note_signals(HANDED_ON)

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
        _write_lines(event, f"{self.host}.{os.getpid()}.{self._count}")

    def run(self, ranks: list[Rank]) -> int:
        """Until every rank has ended; the exit status."""
        self._ranks = tuple(rank.number for rank in ranks)
        self._supervisor.run(ranks, self._received, self._obey, stdin=subprocess.DEVNULL)
        return self.code

    def _obey(self) -> None:
        """Wait a moment for orders."""
        if self._orders is None:
            time.sleep(POLL_S)
            return
        ready, _, _ = select.select([self._orders], [], [], POLL_S)
        if not ready:
            return
        try:
            text = os.read(self._orders, 4096).decode()
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


def _write_lines(event: Event, sender: str) -> None:
    with suppress(OSError):  # nobody listens any more
        os.write(2, "".join(f"{line}\n" for line in lines_of(event, sender)).encode())


# One task of mpirun or srun


def task_rank(argv: list[str], environ: dict[str, str]) -> Rank:
    """The one rank of this task, with its place under the names that torch and DeepSpeed read."""
    # This task was started by mpirun or srun: an outer launcher's RANK is not about it.
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    inner = {name: value for name, value in environ.items() if name not in outer}
    place = place_from(inner)
    local_size = _local_size(inner, place.world_size)
    place = replace(place, local_size=local_size, master_port=place.master_port or FALLBACK_PORT)
    # Which host this is among how many is not told, and nothing needs it here.
    places = {name: value for name, value in place.environment().items() if not name.startswith("CROSS_")}
    return Rank(number=place.rank, argv=argv, environment={**inner, **machine_environment(inner, local_size), **places})


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
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else world_size


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


# A host behind ssh


def remote_text(root: Path, python: str) -> str:
    """What the shell of the other host is given: starts the agent there.

    >>> remote_text(Path("/my; code"), "/usr/bin/python3")
    "cd '/my; code' && exec /usr/bin/python3 -u -m megatron.launch.agent"
    """
    return f"cd {shlex.quote(str(root))} && exec {shlex.quote(python)} -u -m megatron.launch.agent"


def ssh_command(host: str, environ: Mapping[str, str]) -> list[str]:
    """ssh to a host, with what PDSH_SSH_ARGS_APPEND adds."""
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    more = shlex.split(environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", "-T", "-x", *more, *options, host, remote_text(project_folder(), sys.executable)]


def _run_over_ssh(host: str, environ: dict[str, str]) -> int:
    """Start the agent of a host, hand it its task and later orders, and return its exit status."""
    folder = Path(environ[FOLDER])
    plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    told = {**plan["all"], **plan["hosts"][host], "host": host}
    told["environment"] |= {name: environ[name] for name in plan["secrets"] if name in environ}
    # Signals end pdsh; this process goes on until the agent has ended.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    ssh = subprocess.Popen(ssh_command(host, environ), stdin=subprocess.PIPE, preexec_fn=dying_with_parent(signal.SIGKILL))
    code = _attend_ssh(ssh, json.dumps(told).encode() + b"\n", folder / ORDERS_FILE)
    if code == SSH_FAILED or code < 0:
        text = f"lost: the connection to its host ended (ssh, exit status {code}): everything on it was killed, or it cannot be reached"
        _write_lines(Event(what="lost", host=host, rank=None, at=time.time(), code=1, text=text), f"reach.{host}")
    return code if code >= 0 else 1


def _attend_ssh(ssh: subprocess.Popen[bytes], task: bytes, orders: Path) -> int:
    """Give the agent its task, then every order that appears in the file `orders`, until ssh ends; its exit status."""
    _put(ssh, task)
    seen = 0
    deadline: float | None = None
    while (code := ssh.poll()) is None:
        if deadline is not None:
            time.sleep(POLL_S)
            if time.monotonic() > deadline:
                ssh.kill()
            continue
        ready, _, _ = select.select([STDIN], [], [], POLL_S)
        if ready and not os.read(STDIN, 4096):
            # pdsh, and with it the launcher, is gone: so will be the agent when its orders end.
            deadline = time.monotonic() + PATIENT_LAST_S + LAST_S
            if ssh.stdin:
                ssh.stdin.close()
        elif orders.exists():
            new = orders.read_bytes()[seen:]
            seen += len(new)
            _put(ssh, new)
    return code


def _put(ssh: subprocess.Popen[bytes], data: bytes) -> None:
    with suppress(BrokenPipeError):
        if ssh.stdin and data:
            ssh.stdin.write(data)
            ssh.stdin.flush()


def main(argv: list[str]) -> int:
    """Run one host's ranks, one task, or the way to a host."""
    environ = dict(os.environ)
    if argv[:1] == [TASK]:
        return _run_task(argv[1:], environ)
    if argv[:1] == [SSH]:
        return _run_over_ssh(argv[1], environ)
    # Unbuffered, as orders are read from the descriptor itself.
    with open(STDIN, "rb", buffering=0, closefd=False) as stream:
        told = json.loads(stream.readline())
    agent = Agent(told["host"], orphan=signal.SIGTERM, orders=STDIN)
    os.chdir(told["folder"])
    return agent.run(host_ranks(told, environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
