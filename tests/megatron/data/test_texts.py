# SPDX-License-Identifier: Apache-2.0
"""Reading documents out of files."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from megatron.data.texts import read_texts
from megatron.errors import DataError


def test_every_kind_of_file_in_order(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in ["one", "two\n", ""])
    (tmp_path / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write(lines)
    (tmp_path / "c.txt").write_text("whole\n\nfile", encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("y", "second")
        archive.writestr("x", "first")
    (tmp_path / "e.bin").write_bytes(b"\0")
    assert list(read_texts([tmp_path])) == ["one", "two\n", "", "one", "two\n", "", "whole\n\nfile", "first", "second"]
    assert list(read_texts([tmp_path / "a.jsonl"], key="body")) == ["ONE", "TWO\n", ""]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"text": "a"}\n{broken\n', "not JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', "no text under"),
        ('{"text": "a"}\n[1]\n', "no text under"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=what) as caught:
        list(read_texts([path]))
    assert caught.value.where == f"{path}:2"


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        list(read_texts([tmp_path / "absent"]))
    with pytest.raises(DataError, match="holds no text file"):
        list(read_texts([tmp_path]))
