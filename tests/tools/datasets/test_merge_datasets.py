# SPDX-License-Identifier: Apache-2.0
"""merge_datasets.py and dataset_token_count.py: the reference's bytes, document borders, and what must not be mixed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.indexed_dataset import HEADER, MAGIC, VERSION, IndexedDataset, data_file
from megatron.data.inspect.merging import merge as library_merge
from megatron.data.legacy_dataset import LegacyDataset
from megatron.errors import DataError
from megatron.tokenizer import TokenizerKind, TokenizerSource, open_tokenizer
from support.tree import ROOT
from tests.support.indexed import IndexedDatasetBuilder

sys.path.insert(0, str(ROOT / "tools" / "datasets"))

import dataset_token_count  # noqa: E402
import merge_datasets  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
# sha256 of .bin files recorded with the reference's tools
CORPUS, MERGED, CACHED = (
    "de64bb5be720f274f846a734209fc1256ff3a511357df28c2d43a0324089da8d",
    "ffe0b111fdfb0348153295e25710f4c9897fc3d398b9fb3ab462f358a9cc96d9",
    "60ae13afd4ded8ed568f38cf02d02c11ed6bbbc055de3a3c4d6717befecfe737",
)


def write(prefix: Path, documents: list[list[int]], dtype: object = np.uint16) -> Path:
    with IndexedDatasetBuilder(prefix, dtype) as builder:  # type: ignore[arg-type]
        for document in documents:
            builder.add_document(document)
        builder.finalize()
    return prefix


def merge(folder: Path, output: Path, *more: str) -> int:
    return merge_datasets.main(["--input", str(folder), "--output-prefix", str(output), *more])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def corpus() -> list[list[int]]:
    """The recorded corpus as documents of ids, each with its end-of-document id."""
    tokenizer = open_tokenizer(TokenizerSource(TokenizerKind.HF, str(GOLDEN / "tokenizer" / "tokenizer.json")))
    lines = (GOLDEN / "tokenizer" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch([json.loads(line)["text"] for line in lines]) if ids]


def test_the_recorded_merge_with_its_document_borders(tmp_path: Path, corpus: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    write(source / "aa", corpus)
    assert sha256(source / "aa.bin") == CORPUS
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / "tools" / "pre_b" / f"ds_text_document{suffix}", source / f"bb{suffix}")
    assert merge(source, tmp_path / "out" / "merged") == 0
    assert sha256(tmp_path / "out" / "merged.bin") == MERGED
    # The reference leaves doc_idx at [0] here: every border is lost.
    merged = IndexedDataset(tmp_path / "out" / "merged")
    assert merged.doc_idx.tolist() == list(range(358)) and merged.num_tokens == 89959
    assert [part.tolist() for part in (merged[0], merged[296])] == [corpus[0], corpus[-1]]
    assert "357 documents, 89959 values (uint16) of 2 pairs" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merged.bin", "merged.idx"]
    assert dataset_token_count.main([str(source / "aa"), str(source / "bb")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        f"Checking file {source / 'aa'}",
        "Dataset size in tokens is 84329",
        f"Checking file {source / 'bb'}",
        "Dataset size in tokens is 5630",
    ]


def test_legacy_files_are_read(tmp_path: Path, corpus: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(GOLDEN / "tools" / "pre_impl_cached" / "ds_text_document.idx", source)
    np.concatenate([np.array(document, "<i4") for document in corpus]).tofile(source / "ds_text_document.bin")
    assert sha256(source / "ds_text_document.bin") == CACHED
    assert merge(source, tmp_path / "merged") == 0
    assert sha256(tmp_path / "merged.bin") == CACHED
    merged = IndexedDataset(tmp_path / "merged")
    assert [document.tolist() for document in merged] == corpus and merged.doc_idx.tolist() == list(range(298))
    assert dataset_token_count.main([str(source / "ds_text_document")]) == 0
    assert "Dataset size in tokens is 84329" in capsys.readouterr().out
    # cut short
    (source / "ds_text_document.bin").write_bytes((source / "ds_text_document.bin").read_bytes()[:-4])
    assert merge(source, tmp_path / "again") == 77 and not data_file(tmp_path / "again").exists()
    with pytest.raises(DataError, match="promises 337316"):
        LegacyDataset(source / "ds_text_document")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.tuples(st.lists(st.lists(st.integers(0, 60000), max_size=5), max_size=5), st.sampled_from(["u2", "i4", "i8"])),
        min_size=1,
        max_size=4,
    )
)
def test_merged_is_the_parts_one_after_the_other(tmp_path: Path, parts: list[tuple[list[list[int]], str]]) -> None:
    source = tmp_path / "in"
    shutil.rmtree(source, ignore_errors=True)
    for number, (documents, dtype) in enumerate(parts):
        write(source / f"part{number}", documents, dtype)
    assert merge(source, tmp_path / "out") == 0
    merged = IndexedDataset(tmp_path / "out")
    together = [document for documents, _ in parts for document in documents]
    assert [document.tolist() for document in merged] == together
    assert merged.doc_idx.tolist() == list(range(len(together) + 1))
    assert merged.dtype == np.result_type(*(dtype for _, dtype in parts))
    # The one writer gives the same bytes.
    with IndexedDatasetBuilder(tmp_path / "built", merged.dtype) as builder:
        for number in range(len(parts)):
            builder.merge(source / f"part{number}")
        builder.finalize()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"built{suffix}").read_bytes()


def test_blocks_smaller_than_a_part_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for name, dtype in (("a", np.uint16), ("b", np.int32)):
        write(tmp_path / "in" / name, [rng.integers(0, 60000, size).tolist() for size in rng.integers(0, 30, 50)], dtype)
    assert merge(tmp_path / "in", tmp_path / "whole") == 0
    monkeypatch.setattr("megatron.data.inspect.merging.INDEX_STEP", 7)
    monkeypatch.setattr("megatron.data.inspect.merging.COPY_BYTES", 64)
    assert merge(tmp_path / "in", tmp_path / "blocks") == 0
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"blocks{suffix}").read_bytes()


def test_whole_and_fractional_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a_reward_document", [[1], [-3]], np.int32)
    write(tmp_path / "in" / "b_reward_document", [[0.25]], np.float32)  # type: ignore[list-item]
    assert merge(tmp_path / "in", tmp_path / "out") == 0
    assert IndexedDataset(tmp_path / "out").values.tolist() == [1.0, -3.0, 0.25]
    write(tmp_path / "in" / "a_reward_document", [[2**24 + 1]], np.int32)
    assert merge(tmp_path / "in", tmp_path / "out") == 77 and "cannot be held as float32" in capsys.readouterr().err
    write(tmp_path / "in" / "c", [[1]])
    assert merge(tmp_path / "in", tmp_path / "out") == 77 and "several streams" in capsys.readouterr().err
    write(tmp_path / "ids" / "a_document", [[1]])
    write(tmp_path / "ids" / "a_document_logprobs", [[0.5]], np.float32)  # type: ignore[list-item]
    assert merge(tmp_path / "ids", tmp_path / "out") == 77 and "others fractions" in capsys.readouterr().err
    # The earlier result is untouched and nothing half-made is left.
    assert IndexedDataset(tmp_path / "out").values.tolist() == [1.0, -3.0, 0.25]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx"]


def test_streams_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    # "a_l" sorts behind "a" among the tokens, and before it among the labels.
    for name, documents in (("a", [[1, 2], [3]]), ("a_l", [[4, 5, 6]])):
        write(source / f"{name}_document", documents)
        write(source / f"{name}_label_document", [[-100] * len(document) for document in documents], np.int32)
    assert merge(source, tmp_path / "out") == 77
    assert "*_label_document: 2" in (said := capsys.readouterr().err) and "--by-stream" in said
    assert merge(source, tmp_path / "out", "--by-stream") == 0
    tokens, labels = (IndexedDataset(tmp_path / f"out{name}") for name in ("_document", "_label_document"))
    assert tokens.values.tolist() == [1, 2, 3, 4, 5, 6] and tokens.sizes.tolist() == labels.sizes.tolist() == [2, 1, 3]
    write(source / "a_label_document", [[-100], [-100, -100]], np.int32)
    assert merge(source, tmp_path / "out", "--by-stream") == 77 and "other lengths" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a", [[1]])
    for output in ("in/a", "in/merged"):
        assert merge(tmp_path / "in", tmp_path / output) == 77 and "among its inputs" in capsys.readouterr().err
    (tmp_path / "in" / "b.bin").touch()
    assert merge(tmp_path / "in", tmp_path / "out") == 77 and "b.idx is missing" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert merge(tmp_path / folder, tmp_path / "out") == 77
    assert not data_file(tmp_path / "out").exists()
    with pytest.raises(DataError, match="one of the inputs"):
        library_merge([str(tmp_path / "in" / "a")], tmp_path / "in" / "a")


def test_documents_of_several_sequences_keep_their_marks(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name, marks in (("a", [0, 2, 3]), ("b", [0, 1, 2])):
        write(source / name, [[1], [2, 2], [3]])
        raw = (source / f"{name}.idx").read_bytes()
        # three sequences in two documents, of b the last in none
        head = HEADER.pack(MAGIC, VERSION, 8, 3, 3)
        (source / f"{name}.idx").write_bytes(head + raw[HEADER.size : HEADER.size + 36] + np.array(marks, "<i8").tobytes())
    assert merge(source, tmp_path / "out") == 0
    assert IndexedDataset(tmp_path / "out").doc_idx.tolist() == [0, 2, 3, 4, 5, 6]


def test_damaged_indexes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a", [[1], [2, 2], [3]])
    raw = bytearray((tmp_path / "in" / "a.idx").read_bytes())
    for offset, value, said in ((34 + 12 + 8, 4, "one after the other"), (34 + 36 + 8, 9, "marks do not fit")):
        spoilt = raw[:offset] + np.array([value], "<i8").tobytes() + raw[offset + 8 :]
        (tmp_path / "in" / "a.idx").write_bytes(spoilt)
        assert merge(tmp_path / "in", tmp_path / "out") == 77 and said in capsys.readouterr().err
    assert not data_file(tmp_path / "out").exists()


def test_a_killed_run_is_cleared_up_by_the_next(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a", [[1], [2, 2], [3]])
    code = "import os, signal, sys, runpy, shutil; shutil.copyfileobj = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
    call = (
        f"sys.argv = ['m', '--input', 'in', '--output-prefix', 'out/m']; runpy.run_path({merge_datasets.__file__!r}, run_name='__main__')"
    )
    assert subprocess.run([sys.executable, "-c", code + call], cwd=tmp_path, timeout=60).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert merge(tmp_path / "in", tmp_path / "out" / "m") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["m.bin", "m.idx"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "a", [[1], [2, 2], [3]])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:  # filled by somebody else meanwhile
        patch.setattr("megatron.data.inspect.merging.shutil.copyfileobj", full)
        assert merge(tmp_path / "in", tmp_path / "out" / "m") == 77 and "No space left" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("megatron.data.inspect.merging.shutil.disk_usage", lambda _: usage._replace(free=20))
    assert merge(tmp_path / "in", tmp_path / "out" / "m") == 77 and "are free" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_count_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset_token_count.main([]) == 1 and capsys.readouterr().out.startswith("usage:")
    write(tmp_path / "a", [[1, 2]])
    assert dataset_token_count.main([str(tmp_path / "none"), str(tmp_path / "a")]) == 77
    said = capsys.readouterr()
    assert "does not exist" in said.err and "Dataset size in tokens is 2" in said.out
