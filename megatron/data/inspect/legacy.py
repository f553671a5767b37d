# SPDX-License-Identifier: Apache-2.0
"""The legacy "cached" and "lazy" token files, read only, for tools that turn them into today's. Training never sees them.
legacy_index.py tells the format, and writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed_dataset import LEGACY_MAGIC, IndexedDataset, data_file, index_file
from megatron.data.preprocess.legacy_index import HEADER
from megatron.errors import DataError

# 6 and 7 are the floats of C, or both of 8 bytes, whichever tool wrote them: their width tells.
DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    **{(1, 1): np.dtype("u1"), (2, 1): np.dtype("i1"), (3, 2): np.dtype("<i2"), (4, 4): np.dtype("<i4"), (5, 8): np.dtype("<i8")},
    **{(code, width): np.dtype(f"<f{width}") for code in (6, 7) for width in (4, 8)},
}


class LegacyDataset:
    """Read-only view of one legacy pair; the same names as IndexedDataset's.

    sizes    [d] int32   values per sequence
    doc_idx  [D] int64   document marks
    values   [num_tokens] all sequences back to back
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        path, data = index_file(prefix), data_file(prefix)
        raw = path.read_bytes()
        fix = "the file is incomplete or damaged: copy or tokenize it again"
        if len(raw) < HEADER.size:
            raise DataError(f"the index has {len(raw)} bytes, less than its header", where=str(path), fix=fix)
        _, version, code, width, n, dimensions, marks = HEADER.unpack_from(raw)
        if version != 1 or (code, width) not in DTYPES:
            raise DataError(f"version {version}, dtype code {code}, {width} bytes per value: not known", where=str(path), fix=fix)
        self.dtype = DTYPES[code, width]
        expected = HEADER.size + 8 * (2 * (n + 1) + dimensions + marks)
        if len(raw) != expected:
            raise DataError(f"the index has {len(raw)} bytes, its header promises {expected} ({n} sequences)", where=str(path), fix=fix)
        numbers = np.frombuffer(raw, dtype="<i8", offset=HEADER.size)
        _, starts, sizes, self.doc_idx = np.split(numbers, np.cumsum([n + 1, n + 1, dimensions]))
        if dimensions != n or not np.array_equal(np.diff(starts), sizes) or (n and int(starts[0]) != 0):
            raise DataError("the sequences are no rows of tokens lying one after the other", where=str(path), fix=fix)
        self.sizes: NDArray[np.int32] = sizes.astype("<i4")
        wanted, found = int(starts[-1]) * width, data.stat().st_size
        if wanted != found:
            raise DataError(f"the data file has {found} bytes, its index promises {wanted}", where=str(data), fix=fix)
        self.values: NDArray[np.number] = np.asarray(np.memmap(data, dtype=self.dtype, mode="r")) if found else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """Values in all sequences."""
        return int(self.sizes.sum(dtype=np.int64))


def is_legacy(prefix: str | Path) -> bool:
    """Whether the index at `prefix` begins as a legacy one does."""
    try:
        with index_file(prefix).open("rb") as file:
            return file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
    except OSError:
        return False


def open_any(prefix: str | Path) -> IndexedDataset | LegacyDataset:
    """The pair at `prefix`, whichever of the formats it has. Raises DataError."""
    if is_legacy(prefix) and data_file(prefix).is_file():
        return LegacyDataset(prefix)
    return IndexedDataset(prefix)
