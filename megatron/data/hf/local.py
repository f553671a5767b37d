# SPDX-License-Identifier: Apache-2.0
"""Datasets that are files here: which of a folder's files are meant, and JSON files that hold one array of records."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron.data.hf.request import PATH_STARTS, Data, is_path
from megatron.data.preprocess.blocks import BlockStart, RecordBlock, SourceBlock
from megatron.data.preprocess.inputs import KNOWN, SAVED_DATASET, SAVED_SPLITS, FileKind, InputFile, find
from megatron.data.preprocess.sources import BLOCK_RECORDS, BOM, Files
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing", "eval")}
LOOKED_AT = 4096
ABOUT = re.compile(r"(readme|license|licence|dataset_infos?|dataset_dict|state|metadata)\b", re.IGNORECASE)


def local_source(data: Data) -> Files | None:
    """The records of the files meant, if the dataset or its data files are here; None where it must be on the Hub."""
    files = _files(data)
    if files is None:
        return None
    arrays = [file for file in files if _is_array(file)]
    if arrays and len(arrays) < len(files):
        other = next(file.path.name for file in files if file not in arrays)
        raise DataError(
            f"{arrays[0].path.name} is a JSON array, and {other} is not",
            where=data.dataset,
            fix="name files of one kind with --data-files",
        )
    return Arrays(files) if arrays else Files(files)


def _files(data: Data) -> list[InputFile] | None:
    root = Path(data.dataset).expanduser()
    if root.exists():
        inside = root / data.data_dir if data.data_dir else root
        if data.data_files:
            # A path is taken whole, a pattern is a string.
            return find([inside / name if (inside / name).exists() else str(inside / name) for name in data.data_files])
        return _of_split(inside, data.split) if inside.is_dir() else find(inside)
    if data.data_files and all(_here(name) for name in data.data_files):
        log.info("reading %s on this machine, not from the Hub", ", ".join(data.data_files))
        return find(list(data.data_files))
    if is_path(data.dataset) or data.dataset.lower().endswith(KNOWN):
        raise DataError(f"there is no {data.dataset}", where="--dataset", fix="check the path; a name on the Hub is ORG/NAME")
    return None


def _here(name: str) -> bool:
    # A relative pattern is the Hub's, whatever happens to match it here.
    path = Path(name).expanduser()
    return path.exists() or (name.startswith(PATH_STARTS) and bool(glob.glob(str(path), recursive=True)))


def _of_split(folder: Path, split: str) -> list[InputFile]:
    """A folder's files of one split: as saved, or those whose path names it; all where no path names any."""
    if (folder / SAVED_SPLITS).is_file() or (folder / SAVED_DATASET).is_file():
        return find(folder, split=split if (folder / SAVED_SPLITS).is_file() else None)
    files = [file for file in find(folder) if not ABOUT.match(file.path.name)]
    # Of a dataset's repository the texts beside its tables are descriptions.
    files = [file for file in files if file.kind is not FileKind.TEXT] or files
    named = {file.path: split_of(file.path.relative_to(folder).parts) for file in files}
    if not any(named.values()):
        return files
    wanted = next((known for known, names in SPLITS.items() if split in names), split)
    chosen = [file for file in files if named[file.path] == wanted]
    if not chosen:
        found = sorted({name for name in named.values() if name})
        raise DataError(f"no file of the split {split!r}", where=str(folder), fix=f"--split {' or '.join(found)}, or --data-files")
    return chosen


def split_of(parts: Sequence[str]) -> str | None:
    """The split that a path's parts name, the last that does.

    >>> split_of(("data", "train-00000-of-00002.parquet")), split_of(("contest.jsonl",))
    ('train', None)
    """
    for part in reversed(parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(name in words for name in names):
                return split
    return None


@dataclass(frozen=True)
class Arrays(Files):
    """The records of files that hold one JSON array each. A file is read whole: JSON lines are the form for large data."""

    def blocks(self, start: BlockStart) -> Iterator[SourceBlock]:
        """BLOCK_RECORDS records each. Raises DataError for what is no array of objects."""
        for number in range(start.file, len(self.files)):
            path = self.files[number].path
            records = _records(path)
            size = path.stat().st_size
            for first in range(start.offset if number == start.file else 0, len(records), BLOCK_RECORDS):
                part = records[first : first + BLOCK_RECORDS]
                end = first + len(part)
                yield RecordBlock(
                    where=str(path),
                    first=first + 1,
                    source_bytes=size * end // len(records) - size * first // len(records),
                    after=BlockStart(number, end, end),
                    payload=part,
                )


def _is_array(file: InputFile) -> bool:
    """Whether a file of JSON lines begins with a bracket, and so holds an array."""
    if file.kind is not FileKind.LINES or file.compression:
        return False
    with file.path.open("rb") as content:
        return content.read(LOOKED_AT).removeprefix(BOM).lstrip().startswith(b"[")


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = orjson.loads(path.read_bytes().removeprefix(BOM))
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"the JSON array cannot be read: {error}", where=str(path), fix="fix the file, or write JSON lines") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError("not an array of JSON objects", where=str(path), fix="one object per record is wanted")
    return records
