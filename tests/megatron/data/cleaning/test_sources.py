# SPDX-License-Identifier: Apache-2.0
"""Every record is read once, in order, however the input is divided."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.cleaning.sources import Reader, divide, find_inputs
from megatron.data.cleaning.stage_stats import StageStats
from megatron.errors import DataError


def read_all(files, tasks, skip_bad=0):
    """Documents of each task."""
    reader = Reader(tuple(tuple(part) for part in divide(files, tasks)), "text", skip_bad)
    return [list(reader.read(rank, StageStats())) for rank in range(tasks)]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.lists(st.integers(0, 300), max_size=12), min_size=1, max_size=4), tasks=st.integers(1, 9), ended=st.booleans())
def test_every_line_belongs_to_one_task(sizes, tasks, ended, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    files, truth = [], []
    for number, lengths in enumerate(sizes):
        lines = [json.dumps({"text": "x" * length, "n": at}) for at, length in enumerate(lengths)]
        path = folder / f"{number}.jsonl"
        path.write_text("\n".join(lines) + ("\n" if ended and lines else ""))
        files.append(path)
        truth += [("x" * length, f"{path}:{at + 1}") for at, length in enumerate(lengths)]
    parts = read_all(files, tasks)
    assert [(document.text, document.at) for part in parts for document in part] == truth


def test_tasks_get_about_the_same(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": "y" * 90}) + "\n" for _ in range(1000)))
    assert [abs(len(part) - 125) <= 1 for part in read_all([path], 8)] == [True] * 8


RECORDS = [{"id": 1, "text": "one", "meta": {"a": [1, None]}}, {"id": 2, "text": "two", "meta": {"a": []}}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


KINDS = {
    "in.jsonl": bytes,
    "in.jsonl.gz": gzip.compress,
    "in.jsonl.xz": lzma.compress,
    "in.jsonl.zst": lambda raw: zstandard.compress(raw[:20]) + zstandard.compress(raw[20:]),
    "in.parquet": None,
}


def test_kinds(tmp_path):
    for name, pack in KINDS.items():
        path = tmp_path / name
        if pack is None:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        else:
            path.write_bytes(pack(LINES))
        first, second = read_all([path], 2)
        found = first + second
        assert [document.at for document in found] == [f"{path}:1", f"{path}:2"]
        assert [document.record | {"text": document.text} for document in found] == RECORDS
        assert list(found[0].record) == ["id", "text", "meta"]


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 100)[:-20])
    with pytest.raises(DataError, match="in.jsonl.gz cannot be read to its end"):
        read_all([path], 1)


BAD = ['{"text": "a"', "[1]", '{"txt": "a"}', '{"text": 7}', '{"text": "\\ud800"}', "\xff"]


def test_bad_records_are_errors_unless_allowed(tmp_path):
    path = tmp_path / "in.jsonl"
    for line in BAD:
        path.write_bytes(b'{"text": "good"}\n\n' + line.encode("latin-1") + b'\n{"text": "fine"}\n')
        with pytest.raises(DataError, match="in.jsonl:3"):
            read_all([path], 1)
        assert [document.text for document in read_all([path], 1, skip_bad=1)[0]] == ["good", "fine"]


def test_inputs_are_found(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ["a.jsonl.gz", "b.jsonl", "deep/c.parquet"]
    assert find_inputs([str(tmp_path)]) == [tmp_path / name for name in names]
    assert find_inputs([str(tmp_path / "*.jsonl"), str(tmp_path)]) == [
        tmp_path / name for name in ("b.jsonl", "a.jsonl.gz", "deep/c.parquet")
    ]
    for wrong in ("none*", "notes.txt"):
        with pytest.raises(DataError):
            find_inputs([str(Path(tmp_path, wrong))])
