# SPDX-License-Identifier: Apache-2.0
"""Starts Python programs as if by `python ARGUMENTS`, without the ten seconds in which torch, DeepSpeed and transformers are imported.

One server serves a whole run of tests. It imports what training needs at the first request, runs no tensor operation itself, so that it
keeps one thread, and forks a process for every program asked for. Such a process is as new as one from the shell but for what is
imported. It is killed, with all it started, when its starter closes the connection or is gone.

`start` without a server (a person runs one test file by hand on another system) starts the program with subprocess.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import pkgutil
import runpy
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.rank import die_with_parent
from support.tiny import tiny
from support.tree import ROOT

ADDRESS = "TESTS_FORKSERVER"
"""Environment variable: the name of the server's socket."""
ABSTRACT = "\0"
"""In front of the name of a socket that has no file, and so no limit on how long a folder's name is."""

# Also what torch and DeepSpeed import only on first use.
PRELOADED = (
    "numpy.random",
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils.checkpoint",
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_comm",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "tokenizers",
)
SIZE = struct.Struct("!I")
POLL_S = 0.02


def preload() -> None:
    """Import, and do once what is slow only the first time; nothing of it makes a tensor or starts a thread."""
    for name in PRELOADED:
        importlib.import_module(name)
    import deepspeed

    from megatron.neox_arguments import NeoXArgs

    NeoXArgs.from_dict(tiny())
    len(deepspeed.ops.__compatible_ops__)
    for module in pkgutil.walk_packages(importlib.import_module("megatron").__path__, "megatron."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # an optional package is not installed
                importlib.import_module(module.name)
    # The collector of a forked process leaves what is imported alone, and so shares its pages.
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Program:
    """arguments: what follows `python` on the command line; log, errors: the files that get its outputs, at their ends."""

    arguments: tuple[str, ...]
    cwd: str
    env: dict[str, str]
    log: str
    errors: str


class Forked:
    """A program that the server has started, with the part of subprocess.Popen that tests use. It leads a session of its own."""

    def __init__(self, connection: socket.socket, program: Program) -> None:
        self._connection = connection
        self.returncode: int | None = None
        _send(connection, program)
        self.pid = int(self._answer(None))

    def send_signal(self, number: int) -> None:
        """Nothing happens when it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """As `subprocess.Popen.kill`: the process alone."""
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self.returncode = int(self._answer(timeout))
            self._connection.close()
        return self.returncode

    def _answer(self, timeout: float | None) -> int:
        self._connection.settimeout(timeout if timeout is None else max(timeout, 1e-3))
        try:
            answer = _receive(self._connection)
        except TimeoutError:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0.0) from None
        if answer is None:
            raise RuntimeError("the server of forked test programs has ended")
        return int(answer)


def start(
    arguments: Sequence[object], *, cwd: Path, env: Mapping[str, str], log: Path, errors: Path | None = None
) -> Forked | subprocess.Popen[bytes]:
    """Run `python ARGUMENTS` in a session of its own, with exactly this environment.

    log, errors: its outputs are added to these files, without `errors` both to `log`
    """
    words, errors = tuple(map(str, arguments)), errors or log
    if ADDRESS in os.environ:
        log.touch()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(ABSTRACT + os.environ[ADDRESS])
        return Forked(connection, Program(words, str(cwd), dict(env), str(log), str(errors)))
    with log.open("ab") as out, errors.open("ab") as err:
        return subprocess.Popen(
            [sys.executable, *words], cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )


def run(
    arguments: Sequence[object], *, cwd: Path, timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` to its end, with its outputs; killed and subprocess.TimeoutExpired raised when that takes too long."""
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(arguments, cwd=cwd, env=os.environ if env is None else env, log=out, errors=err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(arguments), code, out.read_text(errors="replace"), err.read_text(errors="replace"))


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Have a server until the block ends, known to this process and to those it starts; on Linux, for the CPU."""
    if ADDRESS in os.environ or sys.platform != "linux" or os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        yield
        return
    name = f"tests-forkserver-{os.getpid()}-{secrets.token_hex(4)}"
    server = _listen(name)
    os.environ[ADDRESS] = name
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        server.kill()
        server.wait()


def _listen(name: str) -> subprocess.Popen[bytes]:
    """Start a server on the socket of this name."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(ABSTRACT + name)
    listening.listen(64)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "support.forkserver", str(listening.fileno())]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=(listening.fileno(),))
    listening.close()
    return server


def _send(connection: socket.socket, value: Any) -> None:
    data = pickle.dumps(value)
    connection.sendall(SIZE.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    """The next value; None at the end of the connection."""
    head = connection.recv(SIZE.size, socket.MSG_WAITALL)
    if len(head) < SIZE.size:
        return None
    return pickle.loads(connection.recv(SIZE.unpack(head)[0], socket.MSG_WAITALL))


def _serve(listening: socket.socket) -> Program:
    """Fork a process for every program asked for; returns only in such a process, with what it has to run."""
    running: dict[int, socket.socket] = {}
    warm = False
    while True:
        listening.settimeout(POLL_S if running else None)
        with contextlib.suppress(TimeoutError):
            connection, _ = listening.accept()
            program = _receive(connection)
            if not warm:
                preload()
                warm = True
                if (threads := len(os.listdir("/proc/self/task"))) > 1:
                    raise RuntimeError(f"after the imports this process has {threads} threads and cannot fork safely")
            if program is not None and (pid := os.fork()) == 0:
                for other in (listening, connection, *running.values()):
                    other.close()
                return program
            elif program is not None:
                _tell(connection, pid)
                running[pid] = connection
        for pid in list(running):
            _look_after(pid, running)


def _look_after(pid: int, running: dict[int, socket.socket]) -> None:
    """Tell the starter of a process's end; end the process whose starter is gone."""
    connection = running[pid]
    try:
        gone = connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        gone = False
    if gone:
        for kill in (os.killpg, os.kill):  # a process that was forked just now leads no group yet
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    ended, status = os.waitpid(pid, 0 if gone else os.WNOHANG)
    if ended:
        _tell(connection, os.waitstatus_to_exitcode(status))
        connection.close()
        del running[pid]


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
        _send(connection, number)


def _become(program: Program) -> None:
    """Give this process the session, folder, environment, outputs and arguments of its program."""
    os.setsid()
    die_with_parent()
    for number, path in ((1, program.log), (2, program.errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.chdir(program.cwd)
    os.environ.clear()
    os.environ.update(program.env)
    if program.env.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    if program.env.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    sys.path[:] = [*filter(None, program.env.get("PYTHONPATH", "").split(os.pathsep)), *_PATH]


def _run(arguments: Sequence[str]) -> None:
    """What `python ARGUMENTS` does, from here to the end of the process."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


_PATH = [entry for entry in sys.path if entry and Path(entry) != ROOT / "tests"]


def main() -> None:
    """Serve on the socket whose descriptor is the argument; dies with the process that started it."""
    die_with_parent()
    program = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(program)
    _run(program.arguments)


if __name__ == "__main__":
    main()
