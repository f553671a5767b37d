# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are copied to S3, and when: beside the training, and across starts. Knows no request of S3."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from megatron.atomic_io import Entry, digest_of, sync_folder, write_durably
from megatron.checkpoint.steps.commit import UPLOADING
from megatron.checkpoint.steps.manifest import MANIFEST, read_manifest
from megatron.checkpoint.steps.step_dirs import latest_tag, saved_steps, step_of, step_tag
from megatron.errors import CheckpointError
from megatron.hub.background_queue import BackgroundQueue
from megatron.hub.s3 import Address, S3Prefix, Stopped
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)

FILES_AT_ONCE = 4
PROGRESS_S = 15.0

T = TypeVar("T")


def mark(directory: Path, tag: str) -> None:
    """Note, to be found after a crash too, that a checkpoint is to be uploaded; retention leaves it alone."""
    markers = directory / UPLOADING
    if not markers.is_dir():
        markers.mkdir(parents=True, exist_ok=True)
        sync_folder(directory)
    write_durably(markers / tag, _own_entry(directory / tag).xxh128)


def marked(directory: Path) -> list[str]:
    """Names of the checkpoints to be uploaded, by step."""
    there = {entry.name for entry in (directory / UPLOADING).glob("*")} if (directory / UPLOADING).is_dir() else set()
    return sorted((name for name in there if step_of(name) is not None), key=lambda name: step_of(name) or 0)


class Uploader:
    """Copies every published checkpoint of one run, in a thread of its own. The markers are its queue.

    directory:  `save`
    client:     of S3
    part_bytes: of one part of a large file
    failures:   uploads that were given up so far; each is tried again when the next checkpoint is published, and at the next start
    """

    def __init__(self, directory: Path, client: Any, address: Address, *, part_bytes: int) -> None:
        self.directory = directory
        self.place = S3Prefix(client, address, part_bytes=part_bytes, stopped=lambda: self._queue.stopped, moved=self._count)
        self.failures = 0
        self._lock = threading.Lock()
        self._moved = 0
        self._total = 0
        self._now: str | None = None
        self._queue = BackgroundQueue("upload", lambda: marked(directory), self._attempt)

    def start(self) -> None:
        """Begin; what an earlier start left is taken up."""
        newest = max(saved_steps(self.directory), default=None)
        if newest is not None and (self.directory / step_tag(newest) / MANIFEST).is_file():
            # Also where the process ended between publishing and marking. What is there already is not sent again.
            self._mark(step_tag(newest))
        log.info("checkpoints are copied to %s; looked through first: %s", self.place.address, ", ".join(marked(self.directory)) or "none")
        self._queue.start()

    def published(self, folder: Path) -> None:
        """A checkpoint has got its name; returns at once."""
        if self._mark(folder.name):
            self._queue.wake()

    def drain(self, *, patience_s: float, hurried: Callable[[], bool] = lambda: False, early_s: float = 0.0) -> bool:
        """Wait until everything is uploaded; returns whether it is. The thread has ended, or ends with the process.

        patience_s: give up when nothing moves for so long
        hurried:    whether the process was told to end; then it waits no longer than early_s from there
        """
        if self._queue.busy:
            log.info("waiting for uploads to %s: %s", self.place.address, ", ".join(marked(self.directory)))
        done = self._queue.drain(
            hurried=hurried, early_s=early_s, patience_s=patience_s, progress=lambda: self._moved, report=self._report, report_s=PROGRESS_S
        )
        if not done:
            log.error("not uploaded yet: %s; the next start of this run goes on with it", ", ".join(marked(self.directory)))
        return done

    def stop(self) -> None:
        """Give up at the next part; what was sent stays."""
        self._queue.stop()

    def _report(self) -> None:
        log.info("  uploading %s: %.1f of %.1f MiB", self._now, self._moved / 2**20, self._total / 2**20)

    def _mark(self, tag: str) -> bool:
        try:
            mark(self.directory, tag)
        except Exception as error:  # a full disk, say: the checkpoint is there, and training goes on
            self._failed(tag, error)
            return False
        return True

    def _attempt(self, tag: str) -> None:
        folder, marker = self.directory / tag, self.directory / UPLOADING / tag
        if not folder.is_dir():
            log.warning("%s was deleted before it was uploaded", folder)
            marker.unlink(missing_ok=True)
            return
        try:
            digest = self._upload(folder)
            # It may have been published again meanwhile, with another content.
            if marker.read_text() == digest:
                marker.unlink()
                sync_folder(marker.parent)
        except Stopped:
            return
        except Exception as error:  # whatever fails here must not end a training run
            self._failed(tag, error)

    def _upload(self, folder: Path) -> str:
        """Files first, then the manifest, then `latest`: who finds a manifest there finds all that it names."""
        manifest = read_manifest(folder)
        if manifest is None:
            raise CheckpointError("the checkpoint has no manifest", where=str(folder), fix="publish it with a version that writes one")
        tag, own, began = folder.name, _own_entry(folder), time.monotonic()
        self._now, self._moved, self._total = tag, 0, sum(entry.bytes for entry in manifest.files.values())
        listed = f"{tag}/{MANIFEST}"
        if not self.place.has(listed, own):
            self.place.delete(listed)
        sent: list[int] = []

        def send(item: tuple[str, Entry]) -> None:
            name, entry = item
            if self.place.send(folder / name, f"{tag}/{name}", entry):
                sent.append(entry.bytes)

        each(manifest.files.items(), send, FILES_AT_ONCE)
        self.place.send(folder / MANIFEST, listed, own)
        self._point_latest(tag)
        seconds = max(time.monotonic() - began, 1e-9)
        log.info(
            "  uploaded %s to %s: %d of %d files, %.1f MiB in %.1f s (%.1f MiB/s)",
            *(tag, self.place.address, len(sent), len(manifest.files), sum(sent) / 2**20, seconds, sum(sent) / 2**20 / seconds),
        )
        return own.xxh128

    def _point_latest(self, tag: str) -> None:
        """Name the newest in `latest`: an older one that was late does not take its place, but a run that was set back does."""
        mine, current = step_of(tag) or 0, latest_tag(self.directory)
        before, here = (step_of(name or "") for name in ((self.place.read("latest") or b"").decode(errors="replace"), current))
        late = here is not None and mine > here  # of what the run was set back from
        if tag == current or (not late and (before is None or before <= mine)):
            self.place.write("latest", tag.encode())

    def _failed(self, tag: str, error: Exception) -> None:
        self.failures += 1
        log.error("upload of %s to %s failed (it is tried again later): %s", tag, self.place.address, redact(str(error)))

    def _count(self, number: int) -> None:
        with self._lock:
            self._moved += number


def each(items: Iterable[T], work: Callable[[T], None], workers: int) -> None:
    """Work on all items, several at once, in threads that do not keep the process from ending. Raises the first error."""
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            try:
                work(waiting.get_nowait())
            except queue.Empty:
                return
            except BaseException as error:  # told by the caller's thread
                errors.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _own_entry(folder: Path) -> Entry:
    return digest_of(folder / MANIFEST)
