# SPDX-License-Identifier: Apache-2.0
"""What is done with published checkpoints beside the training, and across starts; and copying them to S3."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from math import inf
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

from megatron.atomic_io import Entry, digest_of, sync_folder, write_durably
from megatron.checkpoint.steps.manifest import MANIFEST, read_manifest
from megatron.checkpoint.steps.step_dirs import UPLOADING, latest_tag, saved_steps, step_of, step_tag
from megatron.errors import CheckpointError
from megatron.hub.s3 import Address, S3Prefix, Stopped
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)

FILES_AT_ONCE = 4
PROGRESS_S = 15.0

T = TypeVar("T")


def marked(directory: Path, place: str = UPLOADING) -> list[str]:
    """Names of the checkpoints that are marked in a folder beside them, by step."""
    there = {entry.name for entry in (directory / place).iterdir()} if (directory / place).is_dir() else set()
    return sorted((name for name in there if step_of(name) is not None), key=lambda name: step_of(name) or 0)


class PublishedQueue:
    """Works off the published checkpoints of one run, one at a time, in a thread of its own, which does not keep the process from ending.

    Markers, to be found after a crash too, are its queue; what failed and keeps its marker is tried again at the next waking.
    directory: `save`
    place:     folder of the markers in it; retention leaves marked checkpoints alone
    waiting, undone, failed: what to say of those waited for, of those left at the end, of one that failed and why
    failures:  how many were given up so far
    """

    def __init__(self, directory: Path, place: str, *, waiting: str, undone: str, failed: str) -> None:
        self.directory = directory
        self.failures = 0
        self.stopped = False
        self._place = place
        self._waiting, self._undone, self._failure = waiting, undone, failed
        self._wanted = threading.Event()
        self._idle = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def marked(self) -> list[str]:
        """Names of those still to be done, by step."""
        return marked(self.directory, self._place)

    def start(self) -> None:
        """Begin; what an earlier start left is taken up."""
        self._wanted.set()
        self._thread.start()

    def published(self, folder: Path) -> None:
        """A checkpoint has got its name; returns at once."""
        if self.mark(folder.name):
            with self._lock:
                self._idle.clear()
                self._wanted.set()

    def mark(self, tag: str) -> bool:
        """Note that a checkpoint is to be done; returns whether that could be written."""
        markers = self.directory / self._place
        try:
            if not markers.is_dir():
                markers.mkdir(parents=True, exist_ok=True)
                sync_folder(self.directory)
            write_durably(markers / tag, self._content(tag))
        except Exception as error:  # a full disk, say: the checkpoint is there, and training goes on
            self._failed(tag, error)
            return False
        return True

    def drain(self, *, patience_s: float = inf, hurried: Callable[[], bool] = lambda: False, early_s: float = 0.0) -> bool:
        """Wait until everything is done; returns whether it is. The thread has ended, or ends with the process.

        patience_s: give up when nothing moves for so long
        hurried:    whether the process was told to end; then it waits no longer than early_s from there
        """
        if self._thread.is_alive() and not self._idle.is_set():
            log.info("waiting for %s", self._waiting % (", ".join(self.marked()) or "nothing"))
        reported_at = moved_at = time.monotonic()
        deadline, moved = inf, self._progress()
        while self._thread.is_alive() and not self._idle.wait(0.1):
            now = time.monotonic()
            if self._progress() != moved:
                moved, moved_at = self._progress(), now
            if now - reported_at >= PROGRESS_S:
                reported_at = now
                self._report()
            if deadline == inf and hurried():
                deadline = now + early_s
            if now - moved_at > patience_s or now >= deadline:
                break
        self.stop()
        if left := self.marked():
            log.error("not %s", self._undone % ", ".join(left))
        return not left

    def stop(self) -> None:
        """Begin no further one, and give up at the next part of one under way; what is done stays."""
        self.stopped = True
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            if self.stopped:
                return
            self._wanted.clear()
            for tag in self.marked():
                if self.stopped:
                    return
                self._attempt(tag)
            with self._lock:
                if not self._wanted.is_set():
                    self._idle.set()

    def _failed(self, tag: str, error: Exception) -> None:
        self.failures += 1
        log.error(self._failure, tag, redact(str(error)))

    def _content(self, tag: str) -> str:
        """Of a marker."""
        return ""

    def _progress(self) -> int:
        """A number that changes while something moves."""
        return 0

    def _report(self) -> None:
        """A line now and then while it is waited for."""

    def _attempt(self, tag: str) -> None:
        """Do one and take its marker away. Raises nothing."""
        raise NotImplementedError


class Uploader(PublishedQueue):
    """Copies every published checkpoint of one run; a failed upload is tried again when the next one is published, and at the next start.

    client:     of S3
    part_bytes: of one part of a large file
    """

    def __init__(self, directory: Path, client: Any, address: Address, *, part_bytes: int) -> None:
        place = str(address).replace("%", "%%")
        undone = "uploaded yet: %s; the next start of this run goes on with it"
        failed = f"upload of %s to {place} failed (it is tried again later): %s"
        super().__init__(directory, UPLOADING, waiting=f"uploads to {place}: %s", undone=undone, failed=failed)
        self.place = S3Prefix(client=client, address=address, part_bytes=part_bytes, stopped=lambda: self.stopped, moved=self._count)
        self._moved = 0
        self._total = 0
        self._now: str | None = None

    def start(self) -> None:
        """Begin; what an earlier start left is taken up."""
        newest = max(saved_steps(self.directory), default=None)
        if newest is not None and (self.directory / step_tag(newest) / MANIFEST).is_file():
            # Also where the process ended between publishing and marking. What is there already is not sent again.
            self.mark(step_tag(newest))
        log.info("checkpoints are copied to %s; looked through first: %s", self.place.address, ", ".join(self.marked()) or "none")
        super().start()

    def _content(self, tag: str) -> str:
        return _own_entry(self.directory / tag).xxh128

    def _progress(self) -> int:
        return self._moved

    def _report(self) -> None:
        log.info("  uploading %s: %.1f of %.1f MiB", self._now, self._moved / 2**20, self._total / 2**20)

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

    def _count(self, number: int) -> None:
        with self._lock:
            self._moved += number


def each(items: Iterable[T], work: Callable[[T], None], workers: int) -> None:
    """Work on all items, several at once, in threads that do not keep the process from ending. Raises the first error."""
    pool = ThreadPool(workers)
    try:
        for _ in pool.imap_unordered(work, items):
            pass
    finally:
        pool.terminate()
        pool.join()


def _own_entry(folder: Path) -> Entry:
    return digest_of(folder / MANIFEST)
