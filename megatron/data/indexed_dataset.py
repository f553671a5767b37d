# SPDX-License-Identifier: Apache-2.0
"""The `.bin/.idx` token files: the format, its reader, and how its index is written.

FORMAT, all integers little-endian. `<prefix>.bin`: the values of all sequences back to back, one dtype. `<prefix>.idx`:

    offset    bytes  content
    0         9      magic "MMIDIDX\\0\\0"
    9         8      u64 version = 1
    17        1      u8 dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float32, 7 float64, 8 uint16
    18        8      u64 N, number of sequences
    26        8      u64 D, number of document marks
    34        4 N    int32 values per sequence
    34+4N     8 N    int64 byte offset of each sequence in .bin
    34+12N    8 D    int64 document marks: 0, then the count of sequences after each document

Training takes each sequence for a document; the marks are kept for other tools.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = dict(enumerate(map(np.dtype, ("u1", "i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2")), start=1))
COPY_BYTES = 16 * 2**20
INDEX_STEP = COPY_BYTES // 8  # values of an index held in memory at once, where they are read from files
DAMAGED = "the file is incomplete or damaged: copy or tokenize it again"


def data_file(prefix: str | Path) -> Path:
    """`<prefix>.bin`."""
    return Path(f"{prefix}.bin")


def index_file(prefix: str | Path) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{prefix}.idx")


def exists(prefix: str | Path) -> bool:
    """Whether both files are there."""
    return data_file(prefix).is_file() and index_file(prefix).is_file()


def map_values(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values of a file, mapped into memory; an empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)


def best_dtype(vocab_size: int | None) -> np.dtype:
    """FORMAT: uint16 where the vocabulary is known and below 65500, else int32."""
    return DTYPES[8] if vocab_size is not None and vocab_size < 65500 else DTYPES[4]


def infer_impl(prefix: str | Path) -> str:
    """The kind of files at `prefix`, told from their first bytes: always "mmap"; other kinds are a DataError."""
    path = index_file(prefix)
    for part in (path, data_file(prefix)):
        if not part.is_file():
            raise DataError(f"dataset file {part} does not exist", where=str(prefix), fix=_missing_fix(str(prefix)))
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic == MAGIC:
        return "mmap"
    if magic.startswith(LEGACY_MAGIC):
        raise DataError(
            "this index has the legacy cached/lazy format (TNTIDX), which cannot be used for training",
            where=str(path),
            fix="tokenize the source again with tools/datasets/preprocess_data.py (--dataset-impl mmap)",
        )
    raise DataError(
        f"not a dataset index: it begins with {magic!r}", where=str(path), fix="give the prefix of a .bin/.idx pair, or tokenize again"
    )


def _missing_fix(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return "give the path without .bin or .idx"
    folder = Path(prefix).parent
    found = sorted(path.stem for path in folder.glob("*.idx"))[:8] if folder.is_dir() else []
    return f"prefixes in {folder}: {', '.join(found)}" if found else "paths are relative to the working directory; tokenize the data first"


def write_index(
    file: IO[bytes],
    dtype: np.dtype,
    counts: tuple[int, int],
    sizes: Callable[[], Iterable[NDArray[np.int32]]],
    document_ends: Iterable[NDArray[np.int64]],
) -> None:
    """Write the `.idx` of values of `dtype`, in memory that does not grow with it.

    counts:        number of sequences, number of documents
    sizes:         gives values per sequence, in parts of any length; called twice
    document_ends: sequences up to the end of each document, in parts of any length
    """
    sequences, documents = counts
    code = next(code for code, known in DTYPES.items() if known == dtype)
    file.write(HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1))
    for part in sizes():
        file.write(part.astype("<i4", copy=False).tobytes())
    start = 0
    for part in sizes():
        if len(part):
            widths = part.astype(np.int64) * dtype.itemsize
            ends = start + np.cumsum(widths)
            file.write((ends - widths).astype("<i8", copy=False).tobytes())
            start = int(ends[-1])
    file.write(bytes(8))
    for marks in document_ends:
        file.write(marks.astype("<i8", copy=False).tobytes())


class IndexedDataset:
    """Read-only view of one `.bin/.idx` pair, mapped into memory.

    sizes    [d] int32   values per document
    doc_idx  [D] int64   document marks of the file (not used for training)
    dtype                of the stored values

    Arrays handed out keep the mapping alive, so they outlive this object. It can be pickled: the copy opens the files again.
    """

    def __init__(self, prefix: str | Path, *, warmup: bool = False) -> None:
        self.prefix = str(prefix)
        infer_impl(prefix)
        raw = np.asarray(np.memmap(index_file(prefix), dtype=np.uint8, mode="r"))
        self.dtype, n, marks = self._header(raw)
        # Copied: 34 is not a multiple of 4, and numpy is slow on unaligned arrays.
        self.sizes: NDArray[np.int32] = np.frombuffer(raw[34 : 34 + 4 * n].tobytes(), dtype="<i4")
        self._offsets: NDArray[np.int64] = raw[34 + 4 * n : 34 + 12 * n].view("<i8")
        self.doc_idx: NDArray[np.int64] = raw[34 + 12 * n : 34 + 12 * n + 8 * marks].view("<i8")
        self._index = raw
        self._data = self._open_data()
        if warmup:
            self._data[:: max(4096 // self.dtype.itemsize, 1)].sum()

    def _header(self, raw: NDArray[np.uint8]) -> tuple[np.dtype, int, int]:
        path = index_file(self.prefix)
        if raw.size < HEADER.size:
            raise DataError(f"the index has {raw.size} bytes, less than its header", where=str(path), fix=DAMAGED)
        _, version, code, n, marks = HEADER.unpack(raw[: HEADER.size].tobytes())
        if version != VERSION:
            raise DataError(
                f"index version {version} is not known (only {VERSION})", where=str(path), fix="tokenize again with this project's tools"
            )
        if code not in DTYPES:
            raise DataError(f"dtype code {code} is not known (1 to 8)", where=str(path), fix=DAMAGED)
        expected = HEADER.size + 12 * n + 8 * marks
        if raw.size != expected:
            raise DataError(f"the index has {raw.size} bytes, its header promises {expected} ({n} sequences)", where=str(path), fix=DAMAGED)
        return DTYPES[code], n, marks

    def _open_data(self) -> NDArray[np.number]:
        path = data_file(self.prefix)
        if len(self) and int(self.sizes.min()) < 0:
            raise DataError("the index holds a negative size", where=str(index_file(self.prefix)), fix="tokenize again")
        wanted, found = self.num_tokens * self.dtype.itemsize, path.stat().st_size
        if wanted != found:
            raise DataError(
                f"the data file has {found} bytes, its index promises {wanted} ({self.num_tokens} values of {self.dtype})",
                where=str(path),
                fix="the pair is incomplete or mixed from two runs: copy both files or tokenize again",
            )
        if len(self):
            last = int(self._offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
            if int(self._offsets[0]) != 0 or last != found:
                raise DataError("the index's offsets do not cover the data file", where=str(index_file(self.prefix)), fix="tokenize again")
        return map_values(path, self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """Values in all documents."""
        return int(self.sizes.sum(dtype=np.int64))

    @property
    def values(self) -> NDArray[np.number]:
        """All documents back to back, [num_tokens], read-only."""
        return self._data

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """`length` values (default: the rest) of document `index` from `offset`, as a read-only view.

        Raises DataError when the slice leaves the document.
        """
        # `item` takes half the time of indexing; this is called once for every document of every sample.
        size = self.sizes.item(index)
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise DataError(f"values {offset} to {stop} of document {index}, which has {size}", where=self.prefix)
        start = self._offsets.item(index) // self._data.itemsize
        return self._data[start + offset : start + stop]

    def __getitem__(self, index: int) -> NDArray[np.generic]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.get(index)

    def digest(self) -> str:
        """sha256 of the index's header and sizes: changes whenever a document's length does."""
        return hashlib.sha256(self._index[: HEADER.size + 4 * len(self)].data).hexdigest()

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (self.prefix,)
