# SPDX-License-Identifier: Apache-2.0
"""Records through an encoder into aligned `.bin/.idx` streams: in parallel, in order, in constant memory.
Knows no text and no tokenizer."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.data.encoders import Encoded, Encoder, EncoderSource
from megatron.data.indexed_dataset import IndexedDatasetBuilder
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)

CHUNK_RECORDS = 64  # records sent to a process at once
CHUNKS_AHEAD = 4  # chunks in flight per process; bounds the memory
LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class Written:
    """What was written. files: stream -> prefix of its .bin/.idx; dropped: records that gave no document"""

    files: dict[str, Path]
    documents: int
    dropped: int
    tokens: dict[str, int]
    seconds: float


def stream_prefix(prefix: Path, stream: str) -> Path:
    """FORMAT: `<prefix>_<stream>_document`."""
    return prefix.with_name(f"{prefix.name}_{stream}_document")


def write(records: Iterable[Any], source: EncoderSource, prefix: Path, *, workers: int = 1) -> Written:
    """Encode every record and write its streams to `<prefix>_<stream>_document.bin/.idx`.

    The files do not depend on `workers`, and appear under their names only when all of them are whole.
    workers: processes that encode; 1 encodes in this one
    """
    start = said = time.monotonic()
    encoder = _opened(source)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    files = {stream: stream_prefix(prefix, stream) for stream in encoder.streams}
    tokens = dict.fromkeys(files, 0)
    documents = dropped = 0
    with ExitStack() as stack:
        builders = {stream: stack.enter_context(IndexedDatasetBuilder(files[stream], dtype)) for stream, dtype in encoder.streams.items()}
        for encoded in _encoded(records, source, encoder, workers):
            if encoded is None:
                dropped += 1
                continue
            for stream, ids in encoded.items():
                builders[stream].add_document(ids)
                tokens[stream] += len(ids)
            documents += 1
            if time.monotonic() - said > LOG_EVERY_S:
                said = time.monotonic()
                log.info("encoded %d documents, %d tokens, %.0f s", documents, sum(tokens.values()), said - start)
        if documents == 0:
            raise DataError("no record gave a document", where=str(prefix), mend="check the input: are its texts empty?")
        for builder in builders.values():
            builder.finalize()
    return Written(files, documents, dropped, tokens, time.monotonic() - start)


def _encoded(records: Iterable[Any], source: EncoderSource, encoder: Encoder, workers: int) -> Iterator[Encoded | None]:
    chunks = _chunks(records)
    if workers <= 1:
        for chunk in chunks:
            yield from encoder(chunk)
        return
    # spawn: a fork of a process whose tokenizer has started threads can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        waiting: deque[Future[list[Encoded | None]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_chunk, source, chunk))
                if len(waiting) >= CHUNKS_AHEAD * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "an encoding process died, most likely for want of memory", where="workers", mend="use fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(records: Iterable[Any]) -> Iterator[list[Any]]:
    stream = iter(records)
    while chunk := list(islice(stream, CHUNK_RECORDS)):
        yield chunk


def _one_thread() -> None:
    # The processes are the parallelism; threads on top of them would only fight for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_chunk(source: EncoderSource, chunk: Sequence[Any]) -> list[Encoded | None]:
    return _opened(source)(chunk)


@lru_cache(maxsize=1)
def _opened(source: EncoderSource) -> Encoder:
    return source.open()
