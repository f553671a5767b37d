# SPDX-License-Identifier: Apache-2.0
"""Every record is read once, in order, however the input is divided."""

from __future__ import annotations

import bz2
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

from megatron.data.cleaning.document import StageStats
from megatron.data.cleaning.sources import Reader, divide, find_inputs
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
    found = [(document.text, document.at) for part in parts for document in part]
    assert [text for text, _ in found] == [text for text, _ in truth]
    # A place is a line of the file, or of the part of it that begins at a byte.
    for (_, at), (_, line) in zip(found, truth, strict=True):
        name, _, number = at.rpartition(":")
        path, _, start = name.partition(" from byte ")
        before = Path(path).read_bytes()[: int(start or 0)]
        assert f"{path}:{before.count(10) + int(number)}" == line and (not before or before.endswith(b"\n"))


def test_no_piece_is_too_small_and_each_byte_is_in_one(tmp_path):
    """Sizes and numbers of tasks at which shares are no whole numbers."""
    for size, tasks in ((1000, 7), (997, 13), (101, 100), (10_000, 64)):
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(b"x" * size)
        pieces = [piece for part in divide([path], tasks) for piece in part]
        assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])] and pieces[-1].end == size
        assert min(piece.end - piece.start for piece in pieces) >= size // tasks


def test_a_plain_file_is_read_once(tmp_path):
    """Whatever the number of tasks: what the process read, as the kernel counts it."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": "y" * 900}) + "\n" for _ in range(4000)))

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    for tasks in (1, 32):
        before = read_bytes()
        assert sum(map(len, read_all([path], tasks))) == 4000
        # A task reads to the end of its last line; what it reads to find its first one is one buffer.
        assert read_bytes() - before < path.stat().st_size * 1.1 + tasks * 40_000


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
        assert [document.at for document in read_all([path], 1)[0]] == [f"{path}:1", f"{path}:2"]
        assert [document.record | {"text": document.text} for document in found] == RECORDS
        assert list(found[0].record) == ["id", "text", "meta"]


def test_damaged_file_is_named(tmp_path):
    """Also one that is only cut short, in every form: no record is lost without a word."""
    noise = "".join(json.dumps({"text": str(hash(str(n)) * n)}) + "\n" for n in range(3000)).encode()
    for name, pack in {**KINDS, "in.jsonl.bz2": bz2.compress}.items():
        path = tmp_path / name
        if pack is bytes:
            continue
        if pack is None:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS * 100), path)
        else:
            path.write_bytes(zstandard.compress(noise) if name.endswith(".zst") else pack(noise))
        whole = path.read_bytes()
        for cut in (len(whole) // 2, len(whole) - 20, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match="damaged") as caught:
                read_all([path], 1)
            assert caught.value.where == str(path), name


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
