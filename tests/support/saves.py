# SPDX-License-Identifier: Apache-2.0
"""A process that only saves, so that it can be killed many times: imports once, then forks a saver for every line it is told.

Run as `python -m support.saves`. A line is `<folder> <first step> <step between saves> <seconds per piece> <background: 0|1>`; the saver
says `saving N` and `saved N <seconds>` for each checkpoint, and `pid P` first. Forking is safe here: nothing before it has started a
thread, and the saver needs no process group.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.tree import ROOT

FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "layer_00-model_00-model_states.pt")
SAVES = 100


class Server:
    """The process that forks savers, as seen by a test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def begin(self, folder: Path, first: int, *, between: int = 1, piece_s: float = 0.0, background: bool = False) -> int:
        """Fork a saver; returns its process id."""
        self._tell(f"{folder} {first} {between} {piece_s} {int(background)}")
        return int(self.heard().removeprefix("pid "))

    def heard(self) -> str:
        """The next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the server has ended"
        return line

    def end(self) -> list[str]:
        """After the saver was killed: what else it had said."""
        self._tell("reap")
        lines = list(iter(self.heard, "reaped"))
        return lines

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@contextmanager
def server() -> Iterator[Server]:
    """Start the server; it ends with the block."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environ.pop("NEOX_FAULTS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "support.saves"], cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def serve() -> None:
    """Fork a saver per line of standard input."""
    import torch

    from megatron.engine.checkpointer import Checkpointer
    from support.fake_engine import FakeEngine

    assert len(os.listdir("/proc/self/task")) == 1, "a thread before the fork"

    class Engine(FakeEngine):
        """Hands over a state that is told by its step."""

        def save(self, directory: Path, tag: str, client_state: Mapping[str, Any], writing: Any) -> None:
            step = float(client_state["iteration"])
            for number, name in enumerate(FILES):
                state = {f"w{entry}": torch.full((64, 16), step + number) for entry in range(6)}
                writing.add({**client_state, "module": state}, directory / tag / name)

    def saver(folder: str, first: str, between: str, piece_s: str, background: str) -> None:
        from megatron import fault_injection

        fault_injection.point = lambda site: time.sleep(float(piece_s))
        saves = Checkpointer(engine=Engine(), directory=Path(folder), compared={}, configs={"a.yml": "x: 1"}, background=background == "1")
        for number in range(SAVES):
            step = int(first) + number * int(between)
            say(f"saving {step}")
            since = time.monotonic()
            saves.save(step, step, step)
            saves.finish()
            say(f"saved {step} {time.monotonic() - since}")

    for line in sys.stdin:
        if line.strip() == "reap":
            os.wait()
            say("reaped")
            continue
        child = os.fork()
        if child == 0:
            # The saver's own words come behind this line, whoever runs first.
            say(f"pid {os.getpid()}")
            saver(*line.split())
            os._exit(0)


if __name__ == "__main__":
    serve()
