# SPDX-License-Identifier: Apache-2.0
"""Stage `decontaminate`: documents that hold texts of evaluation tasks are dropped.

A document goes when it shares a run of 13 words with a task's text (Brown et al., arXiv 2005.14165, appendix C), or most of the runs of 8
words of one text (Chowdhery et al., arXiv 2204.02311, section 8: 70%), which finds short texts and lightly changed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.cleaning.document import Document, Judge, StageStats
from megatron.data.cleaning.sources import ByteRange, find_inputs, records
from megatron.data.cleaning.words import hash_runs, hash_words, plain_words
from megatron.errors import DataError

LONG = 13
SHORT = 8
SHARE = 0.7
TEXT_FILES = (".txt", ".md")
ASKED = ("doc", "target", "arguments")
"""Of a line of lm-eval's logged samples, what the task asks and expects; the rest is a model's answer."""


@dataclass(frozen=True)
class Gathered:
    """What tasks gave. texts: (task, text); short: texts per task that are too short to be found"""

    tasks: list[str]
    texts: int
    short: int


def index_tasks(paths: tuple[str, ...], into: Path) -> Gathered:
    """Write the index of all texts of the tasks: files of JSON lines, Parquet or text, and folders of them. A file's stem is its task.

    JSON: every string of a record, or of its `doc`, `target` and `arguments`, as lm-eval logs samples. A text file: one text a paragraph.
    """
    tasks: dict[str, int] = {}
    long_runs, short_runs, owners = [], [], []
    short = texts = 0
    for task, text in _texts(paths):
        texts += 1
        number = tasks.setdefault(task, len(tasks))
        hashed = hash_words(plain_words(text))
        runs = np.unique(hash_runs(hashed, SHORT))
        if not len(runs):
            short += 1
            continue
        short_runs.append(runs)
        owners.append(number)
        long_runs.append(np.unique(hash_runs(hashed, LONG)))
    if not short_runs:
        raise DataError(
            f"none of the {texts} evaluation texts has {SHORT} words", where=", ".join(paths), fix="name files that hold the tasks' texts"
        )
    owner = np.array(owners, dtype=np.uint32)
    long, text_of_long = _sorted_runs(long_runs)
    flat, text_of_short = _sorted_runs(short_runs)
    sizes = np.array([len(part) for part in short_runs], dtype=np.int64)
    np.savez(into, long=long, long_task=owner[text_of_long], short=flat, short_text=text_of_short, sizes=sizes, owner=owner)
    return Gathered(list(tasks), texts, short)


def _sorted_runs(parts: list[NDArray[np.uint64]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The runs of all texts in order, and the number of the text each is from."""
    flat = np.concatenate(parts)
    text_of = np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts])
    order = np.argsort(flat, kind="stable")
    return flat[order], text_of[order]


def _texts(paths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(task, text) of every file: the plain ones of a path first."""
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise DataError(f"there is no {path}", where=name, fix="check the path")
        plain = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.suffix in TEXT_FILES)
        for file in plain:
            for paragraph in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
                yield file.stem, paragraph
        try:
            others = [] if path in plain else find_inputs([name])
        except DataError:
            if not plain:
                raise
            others = []
        for file in others:
            for at, record in records(ByteRange(str(file))):
                if isinstance(record, str):
                    raise DataError(f"an evaluation record cannot be read: {record}", where=at, fix="fix the file")
                asked = {key: record[key] for key in ASKED if key in record} if "doc" in record else record
                for text in _strings(asked):
                    yield file.name.split(".")[0], text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


@dataclass(frozen=True)
class Decontaminate:
    """index: what index_tasks wrote; tasks: its tasks' names"""

    index: str
    tasks: tuple[str, ...]
    name: str = "decontaminate"

    def open(self, stage_stats: StageStats) -> Judge:
        """Loads the index."""
        with np.load(self.index, allow_pickle=False) as found:
            index = {key: found[key] for key in found.files}

        def judge(document: Document) -> tuple[str, str] | None:
            hashed = hash_words(plain_words(document.text))
            runs = np.unique(hash_runs(hashed, LONG))
            places = np.searchsorted(index["long"], runs)
            hits = places[(places < len(index["long"]))]
            same = index["long"][hits] == runs[: len(hits)]
            if same.any():
                return f"{LONG} words", self.tasks[int(index["long_task"][hits[same][0]])]
            owner = _mostly_held(np.unique(hash_runs(hashed, SHORT)), index)
            return None if owner is None else (f"{SHORT} words", self.tasks[owner])

        return judge


def _mostly_held(runs: NDArray[np.uint64], index: dict[str, NDArray[Any]]) -> int | None:
    """The task of the first text of which `runs` hold SHARE or more."""
    first = np.searchsorted(index["short"], runs, side="left")
    last = np.searchsorted(index["short"], runs, side="right")
    found = np.flatnonzero(last > first)
    if not len(found):
        return None
    texts = np.concatenate([index["short_text"][first[at] : last[at]] for at in found])
    names, counts = np.unique(texts, return_counts=True)
    held = names[counts >= SHARE * index["sizes"][names]]
    return int(index["owner"][held[0]]) if len(held) else None
