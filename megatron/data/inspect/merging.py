# SPDX-License-Identifier: Apache-2.0
"""Several `.bin/.idx` pairs into one, in memory that does not grow with them."""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron.atomic_io import atomic_path
from megatron.data.indexed_dataset import COPY_BYTES, DTYPES, HEADER, INDEX_STEP, data_file, index_file, write_index
from megatron.data.legacy_dataset import is_legacy, open_any
from megatron.errors import DataError

T = TypeVar("T", bound=np.generic)
STREAM = re.compile(r"(?:_(chosen|rejected))?(?:_(label|reward|lengths))?_document$")  # the end of a pair's name says what its values are


class Merged(NamedTuple):
    """What was written: the prefix, its parts in order, and the counts."""

    prefix: str
    parts: tuple[str, ...]
    sequences: int
    documents: int
    values: int
    dtype: np.dtype


def stream_of(prefix: str) -> str:
    """The end of a prefix that names its stream; other names are taken for tokens.

    >>> stream_of("a/set_text_document"), stream_of("a/set_chosen_label_document"), stream_of("a/merged")
    ('_document', '_chosen_label_document', '_document')
    """
    found = STREAM.search(prefix)
    return found.group() if found else "_document"


def find_pairs(folder: str | Path) -> list[str]:
    """Prefixes of all pairs in `folder`, sorted. Raises DataError for a file without its other half, or no pair at all."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", where="--input", fix="give the folder that holds the .bin/.idx pairs")
    halves = {suffix: {path.with_suffix("") for path in folder.glob(f"*{suffix}")} for suffix in (".bin", ".idx")}
    for lonely in sorted(halves[".bin"] ^ halves[".idx"]):
        missing = ".idx" if lonely in halves[".bin"] else ".bin"
        raise DataError(f"{lonely.name}{missing} is missing", where=str(folder), fix="copy it there, or remove its other half")
    if not halves[".bin"]:
        raise DataError("no .bin/.idx pair is there", where=str(folder), fix="give the folder that holds the pairs themselves")
    return [str(path) for path in sorted(halves[".bin"])]


def merge_folder(folder: str | Path, output: str | Path, *, by_stream: bool = False) -> list[Merged]:
    """Merge all pairs of `folder` in sorted order into `output`, or each of its streams into `<output><stream>`.

    Tokens, labels, rewards... in one folder are never mixed: without `by_stream` they are a DataError.
    """
    prefixes = find_pairs(folder)
    target = Path(f"{output}").resolve()
    if target.parent == Path(folder).resolve():
        raise DataError(
            "the output would lie among its inputs, and be one of them the next time",
            where=str(output),
            fix="choose an output prefix in another folder",
        )
    streams: dict[str, list[str]] = {}
    for prefix in prefixes:
        streams.setdefault(stream_of(prefix), []).append(prefix)
    if not by_stream:
        if len(streams) > 1:
            held = ", ".join(f"*{name}: {len(parts)}" for name, parts in sorted(streams.items()))
            raise DataError(
                f"the folder holds several streams, which must not follow each other in one file ({held})",
                where=str(folder),
                fix="add --by-stream to merge each into a file of its own, or keep one stream per folder",
            )
        return [merge(prefixes, output)]
    # By the name without its ending: else 'a' and 'a_l' would change places between tokens and labels.
    for name, parts in streams.items():
        parts.sort(key=lambda prefix, name=name: prefix.removesuffix(name))  # type: ignore[misc]
    _check_aligned(streams, str(folder))
    return [merge(parts, f"{output}{name}") for name, parts in sorted(streams.items())]


def merge(prefixes: Sequence[str], output: str | Path) -> Merged:
    """Write all pairs one after the other as `<output>.bin/.idx`, document marks kept.

    The values are promoted to a dtype that holds all parts' (int to float only where exact). Files get their names when they are whole.
    """
    outputs = {data_file(output).resolve(), index_file(output).resolve()}
    for prefix in prefixes:
        if outputs & {data_file(prefix).resolve(), index_file(prefix).resolve()}:
            raise DataError("the output is one of the inputs", where=str(output), fix="choose another output prefix")
    heads = [_head(prefix) for prefix in prefixes]
    rewards = all(prefix.endswith("_reward_document") for prefix in prefixes)
    dtype = _common_dtype([head.dtype for head in heads], str(output), rewards=rewards)
    done = Merged(
        str(output),
        tuple(prefixes),
        sum(head.sequences for head in heads),
        sum(head.marks for head in heads),
        sum(head.values for head in heads),
        dtype,
    )
    _check_space(done)
    _clear_leftovers(output)
    try:
        with atomic_path(index_file(output)) as index, atomic_path(data_file(output)) as data:
            with data.open("wb") as file:
                for prefix, head in zip(prefixes, heads, strict=True):
                    _copy_values(prefix, head.dtype, dtype, file)
                _settle(file)
            with index.open("wb") as file:
                write_index(file, done.dtype, (done.sequences, done.documents), lambda: _all_sizes(done.parts), _all_ends(done.parts))
                _settle(file)
            # An old index must never be seen beside new data: it goes first, the new one comes last.
            index_file(output).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror}", where=str(output), fix="free some space, or choose another folder") from error
    return done


class _Head(NamedTuple):
    dtype: np.dtype
    sequences: int
    marks: int
    values: int


def _head(prefix: str) -> _Head:
    part = open_any(prefix)
    if not is_legacy(prefix):
        _check_offsets(prefix, part.sizes, part.dtype.itemsize)
    marks = _marks(part.doc_idx, len(part), prefix)
    return _Head(part.dtype, len(part), len(marks), part.num_tokens)


def _check_offsets(prefix: str, sizes: NDArray[np.int32], width: int) -> None:
    """The data is copied as a whole, so the sequences must lie in it one after the other."""
    start, offset = 0, HEADER.size + 4 * len(sizes)
    for block in _steps(sizes):
        found = np.fromfile(index_file(prefix), dtype="<i8", count=len(block), offset=offset)
        ends = start + np.cumsum(block, dtype=np.int64) * width
        if not np.array_equal(found[1:], ends[:-1]) or int(found[0]) != start:
            raise DataError("the sequences do not lie one after the other", where=str(index_file(prefix)), fix="tokenize again")
        start, offset = int(ends[-1]), offset + 8 * len(block)


def _marks(doc_idx: NDArray[np.int64], sequences: int, prefix: str) -> NDArray[np.int64]:
    """Ends of the documents, counted in sequences. An earlier merge tool wrote [0]: each sequence is then a document."""
    if len(doc_idx) < 2:
        return np.arange(1, sequences + 1)
    if int(doc_idx[0]) != 0 or int(doc_idx[-1]) > sequences or bool((np.diff(doc_idx) < 0).any()):
        raise DataError("the document marks do not fit the sequences", where=str(index_file(prefix)), fix="tokenize again")
    ends = np.asarray(doc_idx[1:])
    return ends if int(ends[-1]) == sequences else np.append(ends, sequences)


def _common_dtype(dtypes: Sequence[np.dtype], where: str, *, rewards: bool) -> np.dtype:
    floats = [dtype for dtype in dtypes if dtype.kind == "f"]
    fix = "merge them apart"
    if 0 < len(floats) < len(dtypes) and not rewards:
        raise DataError("some pairs hold ids, others fractions", where=where, fix=fix)
    # Rewards of one part may be whole numbers, of another fractions; int32 beside float32 need not become float64.
    common = np.dtype(np.result_type(*(floats or dtypes))).newbyteorder("<")
    if common not in DTYPES.values():
        raise DataError(f"no dtype of the format holds {sorted({str(d) for d in dtypes})}", where=where, fix=fix)
    return common


def _copy_values(prefix: str, have: np.dtype, want: np.dtype, file: BinaryIO) -> None:
    with data_file(prefix).open("rb") as source:
        if have == want:
            shutil.copyfileobj(source, file, COPY_BYTES)
            return
        while block := source.read(COPY_BYTES):
            values = np.frombuffer(block, dtype=have)
            promoted = values.astype(want)
            if not np.array_equal(promoted.astype(have), values, equal_nan=have.kind == "f"):
                raise DataError(f"some values cannot be held as {want}", where=prefix, fix="merge it apart from pairs of that dtype")
            file.write(promoted.tobytes())


def _all_ends(prefixes: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """Ends of all documents, counted in sequences of the whole output; one part at a time is in memory."""
    before = 0
    for prefix in prefixes:
        part = open_any(prefix)
        for marks in _steps(_marks(part.doc_idx, len(part), prefix)):
            yield marks + before
        before += len(part)


def _all_sizes(prefixes: Sequence[str]) -> Iterator[NDArray[np.int32]]:
    for prefix in prefixes:
        yield from _steps(open_any(prefix).sizes)


def _steps(values: NDArray[T]) -> Iterator[NDArray[T]]:
    return (values[first : first + INDEX_STEP] for first in range(0, len(values), INDEX_STEP))


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _clear_leftovers(output: str | Path) -> None:
    """Remove what runs that were killed left behind."""
    for path in (data_file(output), index_file(output)):
        for left in path.parent.glob(f"{glob.escape(path.name)}.tmp.*"):
            number, _, host = left.name.removeprefix(f"{path.name}.tmp.").partition(".")
            if number.isdecimal() and host in ("", socket.gethostname()) and not Path(f"/proc/{number}").exists():
                left.unlink(missing_ok=True)


def _check_space(done: Merged) -> None:
    folder = Path(done.prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror}", where=str(folder), fix="choose a writable output prefix") from error
    needed = done.values * done.dtype.itemsize + 12 * done.sequences + 8 * done.documents
    if free < needed:
        raise DataError(
            f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free", where=str(folder), fix="free some space, or write elsewhere"
        )


def _check_aligned(streams: dict[str, list[str]], where: str) -> None:
    """Document i of every stream must stay the same document."""
    fix = "put in the missing pair, or make both streams again from the same source"
    chief = next((streams[name] for name in ("_document", "_chosen_document") if name in streams), None)
    for name, parts in streams.items():
        if chief is None or parts is chief:
            continue
        if len(parts) != len(chief):
            raise DataError(f"there are {len(parts)} pairs *{name} beside {len(chief)} of tokens", where=where, fix=fix)
        for tokens, part in zip(chief, parts, strict=True):
            mine, theirs = open_any(part), open_any(tokens)
            if len(mine) != len(theirs):
                raise DataError(f"{len(mine)} documents beside {len(theirs)} of {tokens}", where=part, fix=fix)
            same_kind = name.replace("_label", "") == stream_of(tokens)
            if same_kind and not np.array_equal(mine.sizes, theirs.sizes):
                raise DataError(f"its documents have other lengths than those of {tokens}", where=part, fix=fix)
