# SPDX-License-Identifier: Apache-2.0
"""Datasets and tokenizers of the Hugging Face Hub: found, downloaded, read as Arrow tables with few pages of their files in memory."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from megatron.data.hf.request import Data
from megatron.data.preprocess.blocks import ArrowBlock, BlockStart, SourceBlock
from megatron.data.preprocess.sources import BLOCK_BYTES
from megatron.errors import DataError
from megatron.hub.client import DATASET_FIX, Sleep, ask_hub, dataset_commit, snapshot

TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"]
TOKENIZER_FILES += ["additional_chat_templates/*"]
MAPPED_BYTES = 64 << 20
"""So much of a file is read before it is mapped anew: pages of a mapping count as this process's memory until it ends."""


@dataclass(frozen=True)
class HubRows:
    """The rows of a dataset, a Source. They are downloaded at the first use and read from the files of `datasets`' cache.

    commit:  of the dataset's repository; None when offline, where the cache decides
    columns: those that are read; None = all
    """

    data: Data
    commit: str | None
    batch_rows: int = 10_000
    workers: int = 1
    wait: Sleep = time.sleep
    columns: tuple[str, ...] | None = None
    _loaded: list[Any] = field(default_factory=list, compare=False, repr=False)

    def rows(self) -> Any:
        """The dataset, as `datasets` gives it."""
        if not self._loaded:
            self._loaded.append(_load(self))
        return self._loaded[0]

    @property
    def total_bytes(self) -> int | None:
        """Of the rows in memory, the chosen columns only."""
        data = self.rows().data
        return int((data if self.columns is None else data.select(list(self.columns))).nbytes)

    def facts(self) -> list[dict[str, Any]]:
        """The dataset and its commit."""
        return [{**asdict(self.data), "data_files": list(self.data.data_files), "commit": self.commit}]

    def blocks(self, start: BlockStart) -> Iterator[SourceBlock]:
        """About BLOCK_BYTES each."""
        import pyarrow as pa

        pieces = tables(self.rows(), self.columns, split=self.data.split, start=start.offset, batch_rows=self.batch_rows)
        for first, table in pieces:
            step = max(1, int(table.num_rows * BLOCK_BYTES / max(table.nbytes, 1)))
            for begin in range(0, table.num_rows, step):
                part = table.slice(begin, step)
                sink = io.BytesIO()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write(part)
                row = first + begin
                yield ArrowBlock(
                    where=f"{self.data.dataset}/{self.data.split}",
                    first=row + 1,
                    source_bytes=part.nbytes,
                    after=BlockStart(0, row + part.num_rows, row + part.num_rows),
                    payload=sink.getvalue(),
                )


def find(data: Data, *, wait: Sleep = time.sleep, **how: Any) -> HubRows:
    """The dataset on the Hub, nothing downloaded yet; how: further fields of HubRows. Raises DataError where there is none."""
    return HubRows(data, dataset_commit(data.dataset, data.revision, sleep=wait), wait=wait, **how)


def tokenizer_folder(name: str, wait: Sleep) -> str:
    """A folder with the tokenizer of that name on the Hub."""
    folder = snapshot(name, TOKENIZER_FILES, folders=True, sleep=wait)
    if not (folder / "tokenizer.json").exists():
        raise DataError(f"{name} has no tokenizer.json", where="--tokenizer", fix="choose another, or make the file with transformers")
    return str(folder)


def _load(source: HubRows) -> Any:
    import datasets

    data = source.data

    def load() -> Any:
        return datasets.load_dataset(
            data.dataset,
            name=data.subset,
            split=data.split,
            revision=source.commit or data.revision,
            data_dir=data.data_dir,
            data_files=list(data.data_files) or None,
            download_config=datasets.DownloadConfig(num_proc=source.workers if source.workers > 1 else None),
        )

    rows = ask_hub(load, data.dataset, fix=DATASET_FIX, sleep=source.wait)
    if len(rows) == 0:
        raise DataError("the dataset has no rows", where=f"{data.dataset}, split {data.split}", fix="choose another split or subset")
    return rows


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
        for batch in _batches(path, columns):
            for first in range(max(start - row, 0), batch.num_rows, batch_rows):
                yield row + first, batch.slice(first, batch_rows)
            row += batch.num_rows


def _batches(path: str, columns: Sequence[str] | None) -> Iterator[Any]:
    """The record batches of a file, which is mapped anew after each MAPPED_BYTES."""
    import pyarrow as pa

    number, taken = 0, MAPPED_BYTES
    while taken >= MAPPED_BYTES:
        taken = 0
        with pa.memory_map(path) as mapped:
            for batch in islice(pa.ipc.open_stream(mapped), number, None):
                chosen = batch if columns is None else batch.select(list(columns))
                yield chosen
                number += 1
                taken += chosen.nbytes
                if taken >= MAPPED_BYTES:
                    break
