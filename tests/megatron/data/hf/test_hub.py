# SPDX-License-Identifier: Apache-2.0
"""Rows of a cached dataset: all of them, from any row on, and no more memory than a piece."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from megatron.data.hf import hub as room


class Cached:
    """What `datasets` gives of two files in its cache."""

    _indices = None

    def __init__(self, folder: Path) -> None:
        self.table = pa.table({"text": [f"text {number}" for number in range(1000)], "id": range(1000)})
        self.cache_files = []
        for number in range(2):
            path = folder / f"{number}.arrow"
            part = self.table.slice(600 * number, 600)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
                writer.write_table(part, max_chunksize=70)
            self.cache_files.append({"filename": str(path)})

    def with_format(self, name: str) -> Cached:
        return self

    def select_columns(self, columns: list[str]) -> Cached:
        chosen = object.__new__(Cached)
        chosen.table = self.table.select(columns)
        return chosen

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, wanted: slice) -> Any:
        return self.table.slice(wanted.start, wanted.stop - wanted.start)


def test_every_row_comes_once_from_any_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = Cached(tmp_path)
    for mapped_bytes, split in product((1, 3000, 1 << 20), ("train", "train[:100%]")):
        monkeypatch.setattr(room, "MAPPED_BYTES", mapped_bytes)
        for start in (0, 1, 69, 70, 599, 600, 601, 999, 1000):
            found = list(room.tables(cached, ("text",), split=split, start=start, batch_rows=32))
            assert [text for _, table in found for text in table.to_pydict()["text"]] == [f"text {number}" for number in range(start, 1000)]
            assert all(table.num_rows <= 32 and table.schema.names == ["text"] for _, table in found)
            assert [first for first, _ in found] == [start + sum(table.num_rows for _, table in found[:n]) for n in range(len(found))]
