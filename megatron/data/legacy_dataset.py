# SPDX-License-Identifier: Apache-2.0
"""The index of the legacy "cached" and "lazy" datasets: written for users whose other tools still read it, and read by the tools that
merge, count and inspect. Training reads none of them.

FORMAT, all integers little-endian: magic "TNTIDX\\0\\0", u64 version 1, u64 dtype code, u64 bytes per value, u64 number of sequences n,
u64 number of sizes, u64 number of document marks, then int64 arrays: dimension marks [n + 1], value offsets [n + 1], sizes [n], document
marks.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed_dataset import DAMAGED, LEGACY_MAGIC, IndexedDataset, data_file, index_file, map_values
from megatron.errors import DataError

HEADER = struct.Struct("<8sQQQQQQ")
# FORMAT: these codes are not those of the .idx format, and there is no uint16.
CODES: dict[np.dtype[Any], int] = {np.dtype("u1"): 1, np.dtype("i1"): 2, np.dtype("<i2"): 3, np.dtype("<i4"): 4, np.dtype("<i8"): 5}
# 6 and 7 are the floats of C, or both of 8 bytes, whichever tool wrote them: their width tells.
DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    **{(code, dtype.itemsize): dtype for dtype, code in CODES.items()},
    **{(code, width): np.dtype(f"<f{width}") for code in (6, 7) for width in (4, 8)},
}


def write_legacy_index(file: IO[bytes], sizes: NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """The index of sequences of these sizes, one document each."""
    count = len(sizes)
    file.write(HEADER.pack(LEGACY_MAGIC, 1, CODES[dtype.newbyteorder("<")], dtype.itemsize, count, count, count + 1))
    file.write(np.arange(count + 1, dtype="<i8").data)
    file.write(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype("<i8").data)
    file.write(sizes.astype("<i8").data)
    file.write(np.arange(count + 1, dtype="<i8").data)


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
        if len(raw) < HEADER.size:
            raise DataError(f"the index has {len(raw)} bytes, less than its header", where=str(path), fix=DAMAGED)
        _, version, code, width, n, dimensions, marks = HEADER.unpack_from(raw)
        if version != 1 or (code, width) not in DTYPES:
            raise DataError(f"version {version}, dtype code {code}, {width} bytes per value: not known", where=str(path), fix=DAMAGED)
        self.dtype = DTYPES[code, width]
        expected = HEADER.size + 8 * (2 * (n + 1) + dimensions + marks)
        if len(raw) != expected:
            raise DataError(f"the index has {len(raw)} bytes, its header promises {expected} ({n} sequences)", where=str(path), fix=DAMAGED)
        numbers = np.frombuffer(raw, dtype="<i8", offset=HEADER.size)
        _, starts, sizes, self.doc_idx = np.split(numbers, np.cumsum([n + 1, n + 1, dimensions]))
        if dimensions != n or not np.array_equal(np.diff(starts), sizes) or (n and int(starts[0]) != 0):
            raise DataError("the sequences are no rows of tokens lying one after the other", where=str(path), fix=DAMAGED)
        self.sizes: NDArray[np.int32] = sizes.astype("<i4")
        wanted, found = int(starts[-1]) * width, data.stat().st_size
        if wanted != found:
            raise DataError(f"the data file has {found} bytes, its index promises {wanted}", where=str(data), fix=DAMAGED)
        self.values = map_values(data, self.dtype)

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
