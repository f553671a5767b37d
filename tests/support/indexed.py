# SPDX-License-Identifier: Apache-2.0
"""Writing small `.bin/.idx` pairs in tests, independent of the tools that write data sets."""

from __future__ import annotations

import os
import shutil
from array import array
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron.data.indexed_dataset import COPY_BYTES, DTYPES, IndexedDataset, data_file, index_file, write_index
from megatron.errors import DataError


class IndexedDatasetBuilder:
    """Writes one pair. Files appear under their names only in `finalize`; without it nothing is left behind."""

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPES.values():
            raise DataError(
                f"dtype {self.dtype} has no code in the .idx format", where=self.prefix, fix=f"one of {[str(d) for d in DTYPES.values()]}"
            )
        self._sizes, self._marks = array("i"), array("q")
        suffix = f".tmp.{os.getpid()}"
        self._data_tmp, self._index_tmp = Path(f"{self.prefix}.bin{suffix}"), Path(f"{self.prefix}.idx{suffix}")
        try:
            self._data_tmp.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._data_tmp.open("wb")
        except OSError as error:
            raise DataError(f"cannot write: {error.strerror}", where=str(self._data_tmp), fix="choose a writable output prefix") from error

    def add_document(self, ids: ArrayLike) -> None:
        """Append one document, [length]; values must fit the dtype (nothing wraps around)."""
        values = np.asarray(ids).reshape(-1)
        self._write(values)
        self._sizes.append(values.size)
        self._marks.append(len(self._sizes))

    def _write(self, values: NDArray[np.generic]) -> None:
        if values.size and self.dtype.kind in "iu" and not np.can_cast(values.dtype, self.dtype):
            low, high, info = values.min(), values.max(), np.iinfo(self.dtype)
            if values.dtype.kind == "f" or low < info.min or high > info.max:
                raise DataError(f"values {low} to {high} do not fit {self.dtype}", where=self.prefix, fix="choose a wider dtype (int32)")
        self._file.write(values.astype(self.dtype, copy=False).tobytes())

    def merge(self, prefix: str | Path) -> None:
        """Append every document of another pair, keeping its document marks."""
        other = IndexedDataset(prefix)
        if other.dtype == self.dtype:
            with data_file(prefix).open("rb") as source:
                shutil.copyfileobj(source, self._file, COPY_BYTES)
        else:
            for start in range(0, other.values.size, COPY_BYTES):
                self._write(other.values[start : start + COPY_BYTES])
        before = len(self._sizes)
        self._sizes.frombytes(np.asarray(other.sizes, dtype=np.int32).tobytes())
        # A merge tool of old wrote [0] for the marks of N sequences: each sequence is then a document.
        marks = other.doc_idx[1:] if len(other.doc_idx) > 1 else np.arange(1, len(other) + 1)
        self._marks.frombytes((np.asarray(marks, dtype=np.int64) + before).tobytes())

    def finalize(self) -> None:
        """Write the index, then give both files their names."""
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else np.zeros(0, np.int32)
        ends = np.frombuffer(self._marks, dtype=np.int64) if self._marks else np.zeros(0, np.int64)
        with self._index_tmp.open("wb") as index:
            write_index(index, self.dtype, (len(sizes), len(ends)), lambda: [sizes], [ends])
            index.flush()
            os.fsync(index.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        # An old index must never be seen beside new data: it goes first, the new one comes last.
        with suppress(FileNotFoundError):
            index_file(self.prefix).unlink()
        os.replace(self._data_tmp, data_file(self.prefix))
        os.replace(self._index_tmp, index_file(self.prefix))

    def abort(self) -> None:
        """Remove what was written so far."""
        self._file.close()
        for path in (self._data_tmp, self._index_tmp):
            with suppress(FileNotFoundError):
                path.unlink()

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()
