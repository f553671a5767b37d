# SPDX-License-Identifier: Apache-2.0
"""Runs jobs of several ranks one after the other: `python -m support.matrix_server FD FOLDER [cold]`. Knows no task, only how to call it.

Starting Python with torch and DeepSpeed takes ten seconds, a tiny job one. So this process imports them once and forks every rank of
every job: ranks are as new as ones started from the shell, and nothing leaks from one job into the next. It runs no tensor operation
itself, so it has one thread and may fork.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from support.dist import free_port
from support.matrix_job import Failure
from support.rank import die_with_parent
from support.tiny import tiny

TAIL_LINES = 40
# Also what torch and DeepSpeed import only on first use.
PRELOADED = (
    "numpy.random",
    "torch._dynamo",
    "torch.utils.checkpoint",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_comm",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "megatron.checkpoint.build",
    "megatron.checkpoint.loading.merge_tp",
    "megatron.data.build",
    "megatron.engine.build",
    "megatron.objectives.build",
    "support.matrix_rank",
)


@dataclass
class _Child:
    rank: int
    pid: int
    answers: Connection
    log: Path
    answer: Any = None
    failed: str | None = None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def run_job(function: Callable[[Any, int], Any], task: Any, world: int, timeout_s: float, folder: Path) -> Any:
    """`function(task, rank)` in `world` forked processes -> what rank 0 returned, or a Failure; none of them is left over."""
    if (threads := len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1) > 1:
        return Failure(f"this process has {threads} threads and cannot fork safely")
    port = free_port()
    children: list[_Child] = []
    try:
        for rank in range(world):
            children.append(_fork(function, task, rank, world, port, timeout_s, folder))
        return _gather(children, time.monotonic() + timeout_s, timeout_s)
    finally:
        for child in children:
            _end(child.pid)
            child.answers.close()


def _fork(function: Callable[[Any, int], Any], task: Any, rank: int, world: int, port: int, timeout_s: float, folder: Path) -> _Child:
    ours, theirs = Pipe(duplex=False)
    log = folder / f"rank{rank}.log"
    pid = os.fork()
    if pid == 0:
        _be_rank(function, task, theirs, {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}, log, timeout_s)
    theirs.close()
    return _Child(rank, pid, ours, log)


def _be_rank(
    function: Callable[[Any, int], Any], task: Any, answers: Connection, place: dict[str, int], log: Path, timeout_s: float
) -> None:
    """The forked process from its first to its last line; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.enable(file=2)
        # Where every rank stands is in its log before it is killed.
        faulthandler.dump_traceback_later(max(0.5, 0.8 * timeout_s), file=2)
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update(LOCAL_WORLD_SIZE=str(place["WORLD_SIZE"]), LOCAL_SIZE=str(place["WORLD_SIZE"]), MASTER_ADDR="127.0.0.1")
        answers.send((True, function(task, place["RANK"])))
        code = 0
    except BaseException:
        answers.send((False, traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _gather(children: list[_Child], deadline: float, timeout_s: float) -> Any:
    waiting = {child.answers: child for child in children}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            where = "\n".join(f"--- rank {child.rank} ---\n{child.tail()}" for child in waiting.values())
            return Failure(f"not done after {timeout_s:g} s", where)
        for connection in ready:
            child = waiting.pop(connection)  # type: ignore[call-overload]
            try:
                good, child.answer = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                return Failure(f"rank {child.rank} of {len(children)} died", child.tail())
            if not good:
                return Failure(f"rank {child.rank} of {len(children)} failed", f"{child.tail()}\n{child.answer}")
    return children[0].answer


def _end(pid: int) -> None:
    """Kill a rank and all it started, and wait until it is gone."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    os.waitpid(pid, 0)


def warm_up() -> None:
    """Import, and do once what is slow only the first time; nothing of it makes a tensor."""
    for name in PRELOADED:
        importlib.import_module(name)
    import deepspeed

    from megatron.neox_arguments import NeoXArgs

    len(deepspeed.ops.__compatible_ops__)
    NeoXArgs.from_dict(tiny())


def main() -> None:
    """Answer requests (function, task, world, timeout_s) until the other end closes."""
    die_with_parent()
    requests, folder = Connection(int(sys.argv[1])), Path(sys.argv[2])
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if sys.argv[3:] != ["cold"]:
        warm_up()
    requests.send("ready")
    while True:
        try:
            function, task, world, timeout_s = requests.recv()
        except EOFError:
            return
        requests.send(run_job(function, task, world, timeout_s, folder))


if __name__ == "__main__":
    main()
