# SPDX-License-Identifier: Apache-2.0
"""Writing a step's folder: each rank its files, then the manifest, the name and `latest`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from megatron import fault_injection
from megatron.atomic_io import CHUNK_BYTES, Entry, digest_of, new_digest, sync_folder
from megatron.checkpoint.formats.torch_file import host_copy
from megatron.checkpoint.steps.manifest import Manifest, write_manifest


def complete_folder(folder: Path, manifest: Manifest) -> None:
    """Add to the manifest what else lies in the folder (configs, NVMe copies), and write it last.

    Raises OSError.
    """
    files = dict(manifest.files)
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            folders.append(path)
        elif name not in files:
            files[name] = _on_disk(path)
    for place in reversed(folders):
        sync_folder(place)
    write_manifest(folder, replace(manifest, files=dict(sorted(files.items()))))


def _on_disk(path: Path) -> Entry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest_of(path)


@dataclass(frozen=True, kw_only=True)
class WrittenFiles:
    """What became of one rank's files.

    files:    name within the folder -> what it holds
    problems: `file: reason`; when there is one, the folder is no checkpoint
    seconds:  from the first file handed over to the last one written
    """

    files: Mapping[str, Entry]
    problems: tuple[str, ...] = ()
    seconds: float = 0.0


class Abandoned(Exception):
    """Somebody else's part of the checkpoint failed, so this one is not finished."""


class RankFileWriter:
    """Files of one checkpoint on their way to the disk. Nothing here raises: what fails is told by `wait`.

    folder:  where they go
    copies:  write a copy of each state, so that it may change meanwhile; otherwise it must stay as it is until `wait` returns
    threads: files at a time. Without copies, `add` waits for one to be free, so that few states are held at once
    """

    def __init__(self, folder: Path, *, copies: bool = False, threads: int = 2) -> None:
        self.folder = folder
        self._copies = copies
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint")
        self._room = threading.BoundedSemaphore(threads)
        self._files: dict[str, Future[Entry]] = {}
        self._problems: list[str] = []
        self._stop = threading.Event()
        self._begun = time.monotonic()
        self._ended = self._begun

    def add(self, state: Any, path: Path) -> None:
        """Hand over the content of one file."""
        name = path.relative_to(self.folder).as_posix()
        try:
            state = host_copy(state, whole=self._copies)
        except (RuntimeError, MemoryError, TypeError) as error:
            self.fail(name, error)
            return
        if not self._copies:
            self._room.acquire()
        self._files[name] = self._pool.submit(self._write, state, path)

    def fail(self, name: str, error: BaseException) -> None:
        """Keep what went wrong outside of the threads."""
        self._problems.append(f"{name}: {_reason(error)}")

    @property
    def failed(self) -> bool:
        """Whether something has gone wrong already."""
        return bool(self._problems) or any(job.done() and job.exception() is not None for job in self._files.values())

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(job.done() for job in self._files.values())

    def abandon(self) -> None:
        """Have the threads end soon: nobody wants the files any more."""
        self._stop.set()

    def wait(self) -> WrittenFiles:
        """Return when every file is on disk, or has failed."""
        problems, files = list(self._problems), dict[str, Entry]()
        for name, job in self._files.items():
            error = job.exception()
            if error is None:
                files[name] = job.result()
            elif not isinstance(error, Abandoned):
                problems.append(f"{name}: {_reason(error)}")
        self._pool.shutdown()
        if not problems and len(files) < len(self._files):
            problems.append("another rank's files failed first")
        return WrittenFiles(files=files, problems=tuple(problems), seconds=self._ended - self._begun)

    def _write(self, state: Any, path: Path) -> Entry:
        try:
            return write_torch_file(state, path, self._stop)
        finally:
            self._ended = time.monotonic()
            if not self._copies:
                self._room.release()


def write_torch_file(state: Any, path: Path, stop: threading.Event | None = None) -> Entry:
    """`torch.save` to a file that is hashed meanwhile, and on disk when this returns.

    stop: when set, end soon with Abandoned

    Raises OSError or RuntimeError; what was written until then is left.
    """
    with path.open("wb", buffering=CHUNK_BYTES) as file:
        sink = _Sink(file, stop or threading.Event())
        torch.save(state, cast(IO[bytes], sink))
        if sink.error is not None:
            raise sink.error
        file.flush()
        os.fsync(file.fileno())
    return Entry(sink.bytes, sink.digest.hexdigest())


class _Sink:
    """What `torch.save` writes to: passes everything on to a file and to a digest, which costs less than a copy in memory.

    Behind an error it swallows the rest: an exception would have to pass through torch's C++, which tries to go on writing.
    """

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self.error: BaseException | None = None
        self.bytes = 0
        self.digest = new_digest()
        self._file = file
        self._stop = stop

    def write(self, data: memoryview | bytes) -> int:
        """One piece of the file."""
        size = len(data)
        if self.error is not None:
            return size
        try:
            if self._stop.is_set():
                raise Abandoned
            fault_injection.point("write")
            self.digest.update(data)
            self._file.write(data)
        except Exception as error:
            self.error = error
        self.bytes += size
        return size

    def flush(self) -> None:
        """Nothing: the file is flushed once, at its end."""


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
