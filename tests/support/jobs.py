# SPDX-License-Identifier: Apache-2.0
"""Starts train.py on the recorded corpus as a user would, watches it, sends it signals and reads what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from support.dist import free_port
from support.forkserver import Forked, start
from support.tiny import tiny
from support.tree import ROOT

GOLDEN = ROOT / "tests" / "golden"
OUTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DLTS_HOSTFILE", "SLURM_JOB_ID", "SLURM_PROCID", "NEOX_FAULTS")
JOB = "NEOX_TEST_JOB"
POLL_S = 0.05


def settings(folder: Path, world: int = 1, style: str = "neox", **changes: Any) -> dict[str, Any]:
    """A tiny model on the recorded corpus that saves to, and resumes from, folder/run. Batch of 4 sequences, dropout on."""
    corpus = str(GOLDEN / "train" / "data" / "corpus_text_document")
    paths = {f"{split}_data_paths": [corpus] for split in ("train", "valid", "test")}
    batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": None}
    place = {"save": str(folder / "run"), "load": str(folder / "run"), "checkpoint_factor": 1000}
    files = {"index_map_dir": str(folder / "maps"), "log_dir": None}
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    fixed = {"global_num_gpus": world, "vocab_file": str(GOLDEN / "tokenizer" / "tokenizer.json"), "launcher": "local"}
    return tiny(style, **{**paths, **batch, **place, **files, **dropout, **fixed, **changes})


class Ranks:
    """Ranks started without a launcher, as `srun` starts them; when one fails, the others are killed."""

    def __init__(self, processes: Sequence[Forked | subprocess.Popen[bytes]]) -> None:
        self.processes = processes

    @property
    def pid(self) -> int:
        """Process id of rank 0."""
        return self.processes[0].pid

    def poll(self) -> int | None:
        """None while all run; the status of the first that failed, or 0 when all have ended."""
        codes = [process.poll() for process in self.processes]
        failed = [code for code in codes if code]
        for process, code in zip(self.processes, codes, strict=True):
            if failed and code is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        return failed[0] if failed else None if None in codes else 0

    def wait(self, timeout: float | None = None) -> int:
        """Like poll, when no rank runs any more."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("ranks", timeout or 0.0)
            time.sleep(POLL_S)
        return code


class Job:
    """A run in processes of its own: one script alone, or deepy.py with its ranks on this host.

    faults: rows of a plan, see megatron/fault_injection.py
    script: what is run, train.py by default
    launched: whether several ranks are started by deepy.py, which watches them; otherwise as by `srun`, in a tenth of the time
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        faults: Sequence[Mapping[str, Any]] = (),
        env: Mapping[str, str] | None = None,
        script: str = "train.py",
        launched: bool = True,
    ) -> None:
        self.folder = folder
        self.world = int(config["global_num_gpus"])
        self.save = Path(str(config["save"]))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump(dict(config)))
        environ = {name: value for name, value in os.environ.items() if name not in OUTER}
        environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1", JOB: str(folder), **(env or {})}
        if faults:
            plan = folder / "faults.yml"
            plan.write_text(yaml.safe_dump([dict(row) for row in faults]))
            environ["NEOX_FAULTS"] = str(plan)
        self._log = folder / "output.log"
        self._from = self._log.stat().st_size if self._log.exists() else 0
        self.process = self._start(script, path, environ, launched)

    def _start(self, script: str, config: Path, environ: dict[str, str], launched: bool) -> Forked | subprocess.Popen[bytes] | Ranks:
        words = [str(ROOT / script), str(config)]
        if self.world == 1 or launched:
            return start(words if self.world == 1 else [str(ROOT / "deepy.py"), *words], cwd=ROOT, env=environ, log=self._log)
        place = {"WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        envs = [
            {**environ, **{name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}}
            for rank in range(self.world)
        ]
        return Ranks([start(words, cwd=ROOT, env=env, log=self._log) for env in envs])

    @property
    def output(self) -> str:
        """What this run has printed so far."""
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    def wait(self, timeout_s: float = 100.0) -> int:
        """The exit status; a run that does not end in time is killed and fails the test."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            output = self.output
            self.kill()
            raise AssertionError(f"the run did not end within {timeout_s:g} s:\n{output[-4000:]}") from None

    def until(self, seen: Callable[[str], bool] | str, timeout_s: float = 60.0) -> None:
        """Wait until the output holds a text (or satisfies a condition)."""
        found = (lambda text: seen in text) if isinstance(seen, str) else seen
        deadline = time.monotonic() + timeout_s
        while not found(self.output):
            if self.process.poll() is not None or time.monotonic() > deadline:
                output = self.output
                self.kill()
                raise AssertionError(f"the run ended, or did not say it within {timeout_s:g} s:\n{output[-4000:]}")
            time.sleep(POLL_S)

    def pids(self) -> dict[int, int]:
        """{rank: process id} of the ranks that are alive."""
        if isinstance(self.process, Ranks):
            return {rank: process.pid for rank, process in enumerate(self.process.processes) if process.poll() is None}
        if self.world == 1:
            return {0: self.process.pid}
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = _environment(entry)
            except OSError:
                continue
            if environ.get(JOB) == str(self.folder) and environ.get("RANK"):
                found[int(environ["RANK"])] = int(entry.name)
        return found

    def signal_rank(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids()[rank], number)

    def kill(self) -> None:
        """SIGKILL to everything the run has started."""
        for pid in (*self.pids().values(), self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, of all runs in the folder so far."""
        path = self.save / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def losses(self) -> dict[int, float]:
        """{iteration: training loss}; where a step was made twice, the last; none where it was not finite."""
        return {int(row["iteration"]): float(row["lm_loss"]) for row in self.rows() if row.get("lm_loss") is not None}


def _environment(entry: Path) -> dict[str, str]:
    pairs = (item.partition("=") for item in (entry / "environ").read_bytes().decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}
