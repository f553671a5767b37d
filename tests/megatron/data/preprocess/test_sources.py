# SPDX-License-Identifier: Apache-2.0
"""Every kind of file gives the same records, from the start and from every place where reading may go on."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron.data.preprocess import sources
from megatron.data.preprocess.blocks import BlockStart, texts
from megatron.data.preprocess.inputs import find
from megatron.data.preprocess.sources import Files, MadeHere
from megatron.errors import DataError

RECORDS = [{"text": f"\u00e9 document {number} " * (number % 7), "number": number} for number in range(300)]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


def _tar(mode: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, mode) as archive:
            info = tarfile.TarInfo("inside.jsonl")
            info.size = len(LINES)
            archive.addfile(info, io.BytesIO(LINES))

    return write


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside.jsonl.gz", gzip.compress(LINES))


def _arrow(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    opener = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
    with opener(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES[:-1]) and None,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:9000]) + gzip.compress(LINES[9000:])) and None,
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES[:9000]) + zstandard.compress(LINES[9000:])) and None,
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)) and None,
    "a.json.bz2": lambda path: path.write_bytes(bz2.compress(LINES)) and None,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=70),
    "stream.arrow": _arrow,
    "file.arrow": _arrow,
    "a.tar.gz": _tar("w:gz"),
    "a.tar": _tar("w"),
    "a.zip": _zip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_from_every_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 3000)
    WRITERS[name](tmp_path / name)
    (tmp_path / "z.jsonl").write_text('{"text": "last", "number": -1}\n')
    source = Files(find(tmp_path))
    blocks = list(source.blocks(BlockStart()))
    wanted = [*RECORDS, {"text": "last", "number": -1}]
    assert [record for block in blocks for record in block.read().records] == wanted
    assert len(blocks) > 5 and sum(block.source_bytes for block in blocks) <= (source.total_bytes or 0)
    read = 0
    for block in blocks[:-1]:
        read += len(block.read().records)
        if block.after is not None:
            rest = list(source.blocks(block.after))
            assert [record for other in rest for record in other.read().records] == wanted[read:]
            assert rest[0].label(rest[0].read().numbers[0]) == next(
                other.label(other.read().numbers[0]) for other in blocks[blocks.index(block) + 1 :]
            )


def test_columns_are_projected_and_texts_are_whole(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    source = Files(find(tmp_path), columns=("text", "absent"))
    assert next(iter(source.blocks(BlockStart()))).read().records[0] == {"text": ""}
    for number in range(100):
        (tmp_path / f"{number:03d}.txt").write_text(f"text {number}\n\nend")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    plain = Files(find([tmp_path / "b.txt.gz", f"{tmp_path}/0*.txt"]))
    assert list(texts(plain)) == ["packed", *(f"text {number}\n\nend" for number in range(100))]
    first = next(iter(plain.blocks(BlockStart())))
    assert first.after is not None and next(iter(plain.blocks(first.after))).label(1) == str(tmp_path / "063.txt")


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        (b'{"text": "a"}\n{broken\n', "not JSON", 2),
        (b'{"text": "a"}\n\n{"body": "b"}\n', "no text under", 3),
        (b"[1]\n", "a JSON list and not an object", 1),
        (b'{"text": "\xff"}\n', "not JSON", 1),
        (b'{"text": "\\ud83d"}\n', "not JSON", 1),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, what: str, line: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        list(texts(Files(find(path))))
    assert caught.value.where == f"{path}:{line}"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet", "stream.arrow", "a.zip", "a.tar.gz"])
def test_files_cut_short_are_no_end(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged") as caught:
        list(texts(Files(find(tmp_path))))
    assert str(tmp_path / name) in str(caught.value.where)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        list(texts(Files(find(tmp_path))))
    assert caught.value.where == str(tmp_path / "a.txt")
    assert list(texts(Files(find(tmp_path), lenient=True))) == ["ab\ufffdc"]


def test_records_made_here_go_on() -> None:
    source = MadeHere("made", lambda: ({"text": str(number)} for number in range(1000)))
    blocks = list(source.blocks(BlockStart()))
    assert blocks[1].after is not None
    rest = [record["text"] for block in source.blocks(blocks[1].after) for record in block.read().records]
    assert rest == [str(number) for number in range(512, 1000)]
