# SPDX-License-Identifier: Apache-2.0
"""Named corpora: done once, done again when the wish changes, clear when the network is missing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.data.fetching import prepare as room
from megatron.data.fetching.corpora import CORPORA, Corpus, find
from megatron.data.fetching.prepare import Wish, prepare
from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import DataError
from megatron.tokenizer import TokenizerKind, open_tokenizer

REPO = Path(__file__).parents[4]
TEXTS = [f"text number {number} of a corpus of {number * number}" for number in range(200)]


def test_second_call_does_nothing_until_the_wish_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find", lambda name: Corpus(name, "small", local=lambda: iter(TEXTS), vocab_size=300))
    wish = Wish(corpus="small", data_dir=tmp_path)
    first = prepare(wish)
    assert first.fresh and first.documents == 200 and first.prefix == tmp_path / "small" / "small_text_document"
    tokenizer = open_tokenizer(first.tokenizer)
    dataset = IndexedDataset(str(first.prefix))
    assert tokenizer.vocab_size == 300
    assert [tokenizer.decode(dataset.get(index).tolist()) for index in range(200)] == [text + "<|endoftext|>" for text in TEXTS]
    again = prepare(wish)
    assert not again.fresh and (again.tokens, again.documents) == (first.tokens, first.documents)
    assert prepare(Wish(corpus="small", data_dir=tmp_path, vocab_size=280)).fresh
    assert open_tokenizer(first.tokenizer).vocab_size == 280
    binary = first.prefix.with_name(first.prefix.name + ".bin")
    binary.write_bytes(binary.read_bytes()[:-2])
    assert prepare(Wish(corpus="small", data_dir=tmp_path, vocab_size=280)).fresh, "a damaged file is made anew"
    assert prepare(Wish(corpus="small", data_dir=tmp_path, vocab_size=280, again=True)).fresh
    chars = prepare(Wish(corpus="small", data_dir=tmp_path / "chars", tokenizer_type=TokenizerKind.CHAR_LEVEL))
    assert chars.tokens == sum(len(text) + 1 for text in TEXTS) and not (tmp_path / "chars" / "small" / "tokenizer.json").exists()


def test_files_put_there_by_hand_are_used(tmp_path: Path) -> None:
    wish = Wish(corpus="pile", data_dir=tmp_path, tokenizer_type=TokenizerKind.CHAR_LEVEL)
    with pytest.raises(DataError, match="no public download") as caught:
        prepare(wish)
    assert str(tmp_path / "pile" / "raw") == caught.value.where
    (tmp_path / "pile" / "raw").mkdir(parents=True)
    (tmp_path / "pile" / "raw" / "00.jsonl").write_text('{"text": "abc"}\n', encoding="utf-8")
    assert prepare(wish).tokens == 4


def test_every_name_of_the_reference_is_known() -> None:
    known = {corpus.name for corpus in CORPORA}
    reference = (
        "enron pile_subset pile github arxiv europarl freelaw nih pubmed books1 books3 hackernews openwebtext2 stackexchange ubuntu_irc"
    )
    assert set(reference.split()) | {"youtube_subtitles", "c4", "c4_openwebtext", "enwik8", "pydoc"} == known
    with pytest.raises(DataError, match="no corpus 'nothing'"):
        find("nothing")


def test_pydoc_as_a_user_would(tmp_path: Path) -> None:
    command = [sys.executable, "prepare_data.py", "pydoc", "-d", str(tmp_path), "--workers", "1"]
    start = time.monotonic()
    first = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert first.returncode == 0, first.stderr
    assert time.monotonic() - start < 60
    assert "vocab_file" in first.stdout and (tmp_path / "pydoc" / "tokenizer.json").exists()
    dataset = IndexedDataset(str(tmp_path / "pydoc" / "pydoc_text_document"))
    assert len(dataset) > 300 and int(dataset.sizes.sum()) > 1_500_000
    second = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=30)
    assert second.returncode == 0 and "already there" in second.stdout
    offline = subprocess.run(
        [sys.executable, "prepare_data.py", "enwik8", "-t", "HFTokenizer", "-d", str(tmp_path)], cwd=REPO, capture_output=True, text=True
    )
    assert offline.returncode == 77 and "--vocab-file" in offline.stderr and "Traceback" not in offline.stderr
