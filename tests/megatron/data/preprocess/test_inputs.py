# SPDX-License-Identifier: Apache-2.0
"""Which files a user means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.data.preprocess.inputs import FileKind, find
from megatron.errors import DataError


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_files_folders_and_globs_in_order(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "b/2.jsonl",
        "b/1.jsonl.zst",
        "b/.cache/3.jsonl",
        "b/deep/x.txt.gz",
        "b/picture.png",
        "a.parquet",
        "c1.json",
        "c0.json",
        "d,e.txt",
    )
    names = [file.path.relative_to(tmp_path).as_posix() for file in find([f"{tmp_path}/a.parquet,{tmp_path}/b", f"{tmp_path}/c*.json"])]
    assert names == ["a.parquet", "b/1.jsonl.zst", "b/2.jsonl", "b/deep/x.txt.gz", "c0.json", "c1.json"]
    assert [(file.kind, file.compression) for file in find(tmp_path / "b")] == [
        (FileKind.LINES, ".zst"),
        (FileKind.LINES, ""),
        (FileKind.TEXT, ".gz"),
    ]
    assert [file.path.name for file in find(str(tmp_path / "d,e.txt"))] == ["d,e.txt"], "a comma may be part of a name"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("absent.jsonl", "there is no"),
        ("no*.jsonl", "no file matches"),
        ("empty", "holds no file to read"),
        ("picture.png", "no ending that says what it is"),
        ("a.jsonl,a.jsonl", "is named twice"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, what: str) -> None:
    tree(tmp_path, "picture.png", "a.jsonl", "empty/picture.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=what):
        find(given)


def test_folders_of_datasets(tmp_path: Path) -> None:
    for split in ("train", "test"):
        tree(tmp_path, f"{split}/data-00000-of-00001.arrow")
        (tmp_path / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert [file.kind for file in find(tmp_path / "train")] == [FileKind.ARROW]
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert [file.path.parent.name for file in find(tmp_path, split="test")] == ["test"]
    for split in (None, "valid"):
        with pytest.raises(DataError, match="holds the splits train, test"):
            find(tmp_path, split=split)
