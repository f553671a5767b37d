# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are a dataset's split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.data.hf.local import Arrays, local_source
from megatron.data.hf.request import Data, default_folder
from megatron.data.preprocess.blocks import BlockStart
from megatron.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n', encoding="utf-8")
    return folder


def names(data: Data) -> list[str]:
    files = local_source(data)
    assert files is not None
    return [file.path.name for file in files.files]


def test_files_of_the_split(tmp_path: Path) -> None:
    repo = str(
        touch(tmp_path / "repo", "README.md", "dataset_infos.json", "data/train-00000.jsonl", "data/train-1.jsonl", "data/test-0.jsonl")
    )
    assert names(Data(dataset=repo)) == ["train-00000.jsonl", "train-1.jsonl"]
    assert names(Data(dataset=repo, split="test")) == ["test-0.jsonl"]
    assert names(Data(dataset=repo, data_dir="data", data_files=("test*",))) == ["test-0.jsonl"]
    with pytest.raises(DataError, match="no file of the split 'validation'") as caught:
        local_source(Data(dataset=repo, split="validation"))
    assert "test or train" in str(caught.value.fix)
    by_folder = str(touch(tmp_path / "folders", "dev/a.jsonl", "train/a.jsonl"))
    assert names(Data(dataset=by_folder, split="validation")) == ["a.jsonl"]
    loose = str(touch(tmp_path / "loose", "contest.jsonl", "latest.jsonl"))
    assert names(Data(dataset=loose)) == ["contest.jsonl", "latest.jsonl"]
    texts = str(touch(tmp_path / "texts", "a.txt", "b.txt"))
    assert names(Data(dataset=texts)) == ["a.txt", "b.txt"]


def test_what_is_not_here_is_on_the_hub_unless_it_looks_like_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_source(Data(dataset="org/name")) is None and local_source(Data(dataset="name")) is None
    here = str(touch(tmp_path, "x.jsonl") / "x.jsonl")
    assert names(Data(dataset="org/name", data_files=(here,))) == ["x.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert local_source(Data(dataset="org/name", data_files=("*.jsonl",))) is None, "a pattern of the Hub"
    assert names(Data(dataset="org/name", data_files=("./*.jsonl",))) == ["x.jsonl"]
    for path in ("./org/name", "/org", "a/b/c", "data.jsonl"):
        with pytest.raises(DataError, match="there is no"):
            local_source(Data(dataset=path))
    assert default_folder(Path("d"), Data(dataset=here, split="train[:10%]")) == Path("d/x_train--10--")
    assert default_folder(Path("d"), Data(dataset="org/a.b", subset="s", split="test")) == Path("d/a.b_s_test")


def test_json_arrays_are_read_from_any_position(tmp_path: Path) -> None:
    records = [{"text": f"text {number}"} for number in range(600)]
    for number in range(2):
        (tmp_path / f"{number}.json").write_text(json.dumps(records[300 * number : 300 * (number + 1)], indent=1), encoding="utf-8")
    source = local_source(Data(dataset=str(tmp_path)))
    assert isinstance(source, Arrays)
    blocks = list(source.blocks(BlockStart()))
    assert [record for block in blocks for record in block.read().records] == records
    assert sum(block.source_bytes for block in blocks) == source.total_bytes
    for number, block in enumerate(blocks):
        assert block.after is not None
        rest = [record for later in source.blocks(block.after) for record in later.read().records]
        assert rest == [record for later in blocks[number + 1 :] for record in later.read().records]
    (tmp_path / "2.jsonl").write_text('{"text": "a line"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="0.json is a JSON array, and 2.jsonl is not"):
        local_source(Data(dataset=str(tmp_path)))
    (tmp_path / "bad.json").write_text("[1, 2]", encoding="utf-8")
    bad = local_source(Data(dataset=str(tmp_path / "bad.json")))
    with pytest.raises(DataError, match="not an array of JSON objects"):
        list(bad.blocks(BlockStart()))  # type: ignore[union-attr]
