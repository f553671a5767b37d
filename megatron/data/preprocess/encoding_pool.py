# SPDX-License-Identifier: Apache-2.0
"""Processes that turn blocks into encoded batches, in order."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from megatron.data.preprocess.blocks import BlockStart, SourceBlock
from megatron.data.preprocess.encoders import EncodedRecords, Encoder, EncoderSource
from megatron.errors import DataError, NeoXError
from megatron.tokenizer import set_library_threads

AHEAD = 3  # blocks on their way per process; bounds the memory
SHOWN = 5  # faults and dropped records of a block that are kept with their place


@dataclass(frozen=True, kw_only=True)
class Done:
    """A block, encoded.

    faults, droppings: (file:line, why), the first SHOWN of the block; num_faults: all of them
    """

    batch: EncodedRecords
    records: int
    num_faults: int
    faults: list[tuple[str, str]] = field(default_factory=list)
    droppings: list[tuple[str, str]] = field(default_factory=list)
    source_bytes: int = 0
    after: BlockStart | None = None


def encode(block: SourceBlock, encoder: Encoder) -> Done:
    """Read and encode one block."""
    read = block.read()
    batch = encoder(read.records)
    faults = sorted([*read.faults, *((read.numbers[index], what) for index, what in batch.faults)])
    droppings = [(block.label(read.numbers[index]), why) for index, why in batch.droppings[:SHOWN]]
    batch.faults, batch.droppings = [], []
    return Done(
        batch=batch,
        records=len(read.records) + len(read.faults),
        num_faults=len(faults),
        faults=[(block.label(number), what) for number, what in faults[:SHOWN]],
        droppings=droppings,
        source_bytes=block.source_bytes,
        after=block.after,
    )


class EncodingPool:
    """`workers` processes, each with an encoder of its own. Used as a context manager.

    Blocks go to the processes in turn, so that results come back in the order of the blocks. The processes end when this one does,
    however it ends.
    """

    def __init__(self, source: EncoderSource, workers: int) -> None:
        # spawn: a fork of a process whose tokenizer has started threads can hang
        context = multiprocessing.get_context("spawn")
        threads = max(1, usable_cores() // workers)
        resource_tracker.ensure_running()  # else the first start does it, and lets Ctrl-C through again
        self._members: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        for _ in range(workers):
            ours, theirs = context.Pipe(duplex=True)
            process = context.Process(target=_work, args=(source, theirs, threads), daemon=True)
            # Ctrl-C is this process's business: blocked here while it starts, it is blocked there for good.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._members.append((process, ours))

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for process, connection in self._members:
            connection.close()
            if kind is not None:
                process.terminate()
        for process, _ in self._members:
            process.join()

    def encoded(self, blocks: Iterator[SourceBlock]) -> Iterator[Done]:
        """The blocks' results, in order. Raises what a process raised, DataError when one died."""
        waiting: deque[int] = deque()
        for number, block in enumerate(blocks):
            member = number % len(self._members)
            self._send(member, block)
            waiting.append(member)
            if len(waiting) >= AHEAD * len(self._members):
                yield self._receive(waiting.popleft())
        while waiting:
            yield self._receive(waiting.popleft())

    def _send(self, member: int, block: SourceBlock) -> None:
        process, connection = self._members[member]
        try:
            connection.send(block)
        except OSError as error:
            raise self._died(process) from error

    def _receive(self, member: int) -> Done:
        process, connection = self._members[member]
        try:
            result = connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(process) from error
        if isinstance(result, BaseException):
            raise result
        done: Done = result
        return done

    @staticmethod
    def _died(process: multiprocessing.process.BaseProcess) -> DataError:
        process.join(5)
        return DataError(
            f"an encoding process died (exit code {process.exitcode}), probably out of memory",
            where="workers",
            fix="use fewer workers, then run this again: it goes on where it stopped",
        )


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(source: EncoderSource, connection: Connection, threads: int) -> None:
    set_library_threads(threads)
    blocks: queue.SimpleQueue[SourceBlock | None] = queue.SimpleQueue()
    # Received aside, so that the parent never waits for this process while this one waits for the parent.
    threading.Thread(target=_listen, args=(connection, blocks), daemon=True).start()
    try:
        encoder = source.open()
        while (block := blocks.get()) is not None:
            connection.send(encode(block, encoder))
    except BrokenPipeError:
        return
    except NeoXError as error:
        connection.send(error)
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
        raise


def _listen(connection: Connection, blocks: queue.SimpleQueue[SourceBlock | None]) -> None:
    try:
        while True:
            blocks.put(connection.recv())
    except (EOFError, OSError):
        blocks.put(None)
