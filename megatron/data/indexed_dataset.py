# SPDX-License-Identifier: Apache-2.0
"""The `.bin/.idx` token files: the format, its reader and its builder. Knows no tokenizer and no torch.

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
import os
import shutil
import struct
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f4"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
COPY_BYTES = 16 * 2**20
INDEX_STEP = COPY_BYTES // 8
"""Values of an index held in memory at once, where they are read from files."""


def data_file(prefix: str | Path) -> Path:
    """`<prefix>.bin`."""
    return Path(f"{prefix}.bin")


def index_file(prefix: str | Path) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{prefix}.idx")


def exists(prefix: str | Path) -> bool:
    """Whether both files are there."""
    return data_file(prefix).is_file() and index_file(prefix).is_file()


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
        fix = "the file is incomplete or damaged: copy or tokenize it again"
        if raw.size < HEADER.size:
            raise DataError(f"the index has {raw.size} bytes, less than its header", where=str(path), fix=fix)
        _, version, code, n, marks = HEADER.unpack(raw[: HEADER.size].tobytes())
        if version != VERSION:
            raise DataError(
                f"index version {version} is not known (only {VERSION})", where=str(path), fix="tokenize again with this project's tools"
            )
        if code not in DTYPES:
            raise DataError(f"dtype code {code} is not known (1 to 8)", where=str(path), fix=fix)
        expected = HEADER.size + 12 * n + 8 * marks
        if raw.size != expected:
            raise DataError(f"the index has {raw.size} bytes, its header promises {expected} ({n} sequences)", where=str(path), fix=fix)
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
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r")) if found else np.zeros(0, self.dtype)

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


class IndexedDatasetBuilder:
    """Writes one pair. Files appear under their names only in `finalize`; without it nothing is left behind.

    >>> import tempfile
    >>> prefix = tempfile.mkdtemp() + "/letters"
    >>> with IndexedDatasetBuilder(prefix, best_dtype(100)) as builder:
    ...     builder.add_document([5, 6, 0])
    ...     builder.finalize()
    >>> IndexedDataset(prefix)[0].tolist()
    [5, 6, 0]
    """

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
