# SPDX-License-Identifier: Apache-2.0
"""The rows of a `datasets` object as Arrow tables, with few pages of its files in memory at a time. Knows no Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

MAPPED_BYTES = 64 << 20
"""So much of a file is read before it is mapped anew: pages of a mapping count as this process's memory until it ends."""


def tables(rows: Any, columns: Sequence[str] | None, *, split: str, start: int, batch_rows: int) -> Iterator[tuple[int, Any]]:
    """(number of the first row, table or record batch) from row `start` on, of `batch_rows` rows at most."""
    files = [entry["filename"] for entry in rows.cache_files]
    # A split such as train[:10%] is a part of its files.
    if files and rows._indices is None and re.fullmatch(r"\w+(\.\w+)*", split):
        yield from _of_files(files, columns, start, batch_rows)
        return
    chosen = (rows if columns is None else rows.select_columns(list(columns))).with_format("arrow")
    for first in range(start, len(chosen), batch_rows):
        yield first, chosen[first : first + batch_rows]


def _of_files(files: Sequence[str], columns: Sequence[str] | None, start: int, batch_rows: int) -> Iterator[tuple[int, Any]]:
    row = 0
    for path in files:
        number = 0
        while True:
            before = number
            for batch in _piece(path, columns, number):
                number += 1
                for first in range(max(start - row, 0), batch.num_rows, batch_rows):
                    yield row + first, batch.slice(first, batch_rows)
                row += batch.num_rows
            if number == before:
                break


def _piece(path: str, columns: Sequence[str] | None, skip: int) -> Iterator[Any]:
    """The record batches after the first `skip`, about MAPPED_BYTES of them."""
    import pyarrow as pa

    taken = 0
    with pa.memory_map(path) as mapped:
        for batch in islice(pa.ipc.open_stream(mapped), skip, None):
            chosen = batch if columns is None else batch.select(list(columns))
            yield chosen
            taken += chosen.nbytes
            if taken >= MAPPED_BYTES:
                return
