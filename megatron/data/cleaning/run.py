# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: on this machine or as Slurm jobs, once only, and from where a killed run stopped."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash
from filelock import FileLock, Timeout

from megatron.data.cleaning.filters import datatrove, read_blocklist
from megatron.data.cleaning.pipeline import REPORT
from megatron.data.cleaning.plan import CleaningSettings, Job, plan
from megatron.data.cleaning.sources import Reader, divide, find_inputs
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)

SAY_EVERY_S = 10.0
LOCK = "lock"
FORMAT = 1
"""Counts up when a stage's results change: work begun by an older version is not continued."""

Runner = Callable[[list[Job], Path], bool]
"""Runs jobs, whose logs go to a folder. False: they were only handed in."""


@dataclass(frozen=True)
class LocalTasks:
    """On this machine, `workers` tasks at a time."""

    workers: int

    def __call__(self, jobs: list[Job], work: Path) -> bool:
        """True: all is done."""
        with datatrove().processes(self.workers) as pool:
            for number, job in enumerate(jobs):
                began = time.monotonic()
                logs = work / "logs" / f"{number}-{job.name}"
                said = began
                for left in datatrove().LocalExecutor(list(job.steps), tasks=job.tasks, logging_dir=str(logs)).run_with(pool):
                    if left and time.monotonic() - said >= SAY_EVERY_S:
                        said = time.monotonic()
                        log.info(f"{job.name}: {left} of {job.tasks} tasks left")
                log.info(f"{job.name}: {job.tasks} tasks, {time.monotonic() - began:.1f} s")
        return True


@dataclass(frozen=True)
class OnSlurm:
    """As array jobs, each after the one before. options: what the jobs ask for, as datatrove's SlurmPipelineExecutor names it"""

    options: dict[str, Any]

    def __call__(self, jobs: list[Job], work: Path) -> bool:
        """False: they are waiting in the queue."""
        last = None
        for number, job in enumerate(jobs):
            logs = work / "logs" / f"{number}-{job.name}"
            logs.mkdir(parents=True, exist_ok=True)
            last = datatrove().slurm_executor(
                job.steps, tasks=job.tasks, logs=logs, after=last, job_name=f"clean.{job.name}", **self.options
            )
        number_of_last = datatrove().submit(last, work / "submit.log")
        log.info(f"{len(jobs)} jobs submitted, the last one is {number_of_last or 'done already'}; logs: {work / 'logs'}")
        return False


def clean(inputs: Sequence[str], output: Path, settings: CleaningSettings, run: Runner) -> dict[str, Any] | None:
    """Clean files into the folder `output`, which appears whole or not at all. Returns its report; None when jobs were only submitted.

    An output of the same settings and inputs is not made again. Raises DataError when it is of others, or another run is making it.
    """
    datatrove()
    output = output.absolute()
    files = find_inputs(inputs)
    reader = Reader(tuple(tuple(part) for part in divide(files, settings.tasks)), settings.text_key, settings.skip_bad)
    said = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    key = _key(settings, reader)
    work = output.with_name(output.name + ".part")
    if output.exists():
        report = _report(output)
        if report is None or report.get("settings", {}).get("key") != key:
            raise DataError(
                f"{output} exists and is of other inputs or settings", where=str(output), fix="remove it, or name another folder"
            )
        shutil.rmtree(work, ignore_errors=True)
        log.info(f"{output} is there already, of the same inputs and settings")
        return report
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / LOCK, timeout=0):
            _continue_or_clear(work, key)
            if not run(plan(settings, reader, work, output, {"key": key, "input": said}), work):
                return None
    except Timeout as error:
        raise DataError("another run is making this output", where=str(work), fix="wait for it to end") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"there is no room for the run's work: {error.strerror}",
            where=str(work),
            fix="make room and start again: it goes on where it was",
        ) from error
    report = _report(output)
    if report is None:
        raise DataError("the run left no report", where=str(work), fix=f"read {work / 'logs'}")
    shutil.rmtree(work, ignore_errors=True)
    return report


def _report(output: Path) -> dict[str, Any] | None:
    path = output / REPORT
    found: dict[str, Any] | None = orjson.loads(path.read_bytes()) if path.exists() else None
    return found


def _key(settings: CleaningSettings, reader: Reader) -> str:
    """What two runs must share for one to continue the other."""
    files = sorted({piece.path for part in reader.pieces for piece in part})
    stamps = [(name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns) for name in (*files, *_task_files(settings))]
    blocked = read_blocklist(Path(settings.blocklist)).sha256 if settings.blocklist else ""
    return xxhash.xxh128_hexdigest(orjson.dumps([FORMAT, settings, reader.pieces, stamps, blocked]))


def _task_files(settings: CleaningSettings) -> Iterator[str]:
    for name in settings.decontaminate:
        path = Path(name)
        yield from (str(file) for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file())


def _continue_or_clear(work: Path, key: str) -> None:
    path = work / "key"
    if path.exists() and path.read_text() == key:
        log.info(f"continuing what a stopped run left in {work}")
        return
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    path.write_text(key)
