# SPDX-License-Identifier: Apache-2.0
"""Named corpora: done once, done again when the request changes, clear when the network is missing."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.data.hf import corpora
from megatron.data.hf import prepare_corpus as room
from megatron.data.hf.corpora import CORPORA, Corpus, find
from megatron.data.hf.download import Remote
from megatron.data.hf.prepare_corpus import CorpusRequest, prepare
from megatron.data.hf.request import Data
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.preprocess.inputs import kind_of
from megatron.data.preprocess.sources import MadeHere
from megatron.errors import DataError
from megatron.tokenizer import TokenizerKind, open_tokenizer
from tests.support.hub_server import Hub, serve

REPO = Path(__file__).parents[4]
TEXTS = [f"text number {number} of a corpus of {number * number}" for number in range(200)]


def test_second_call_does_nothing_until_the_wish_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find", lambda name: Corpus(name, "small", local=lambda: iter(TEXTS), vocab_size=300))
    request = CorpusRequest(corpus="small", data_dir=tmp_path)
    first = prepare(request)
    assert first.fresh and first.documents == 200 and first.prefix == tmp_path / "small" / "small_text_document"
    tokenizer = open_tokenizer(first.tokenizer)
    dataset = IndexedDataset(str(first.prefix))
    assert tokenizer.vocab_size == 300
    assert [tokenizer.decode(dataset.get(index).tolist()) for index in range(200)] == [text + "<|endoftext|>" for text in TEXTS]
    again = prepare(request)
    assert not again.fresh and (again.tokens, again.documents) == (first.tokens, first.documents)
    assert prepare(CorpusRequest(corpus="small", data_dir=tmp_path, vocab_size=280)).fresh
    assert open_tokenizer(first.tokenizer).vocab_size == 280
    binary = first.prefix.with_name(first.prefix.name + ".bin")
    binary.write_bytes(binary.read_bytes()[:-2])
    assert prepare(CorpusRequest(corpus="small", data_dir=tmp_path, vocab_size=280)).fresh, "a damaged file is made anew"
    assert prepare(CorpusRequest(corpus="small", data_dir=tmp_path, vocab_size=280, again=True)).fresh
    chars = prepare(CorpusRequest(corpus="small", data_dir=tmp_path / "chars", tokenizer_type=TokenizerKind.CHAR_LEVEL))
    assert chars.tokens == sum(len(text) + 1 for text in TEXTS) and not (tmp_path / "chars" / "small" / "tokenizer.json").exists()


def test_files_put_there_by_hand_are_used(tmp_path: Path) -> None:
    request = CorpusRequest(corpus="books1", data_dir=tmp_path, tokenizer_type=TokenizerKind.CHAR_LEVEL)
    with pytest.raises(DataError, match="no public download") as caught:
        prepare(request)
    assert str(tmp_path / "books1" / "raw") == caught.value.where
    (tmp_path / "books1" / "raw").mkdir(parents=True)
    (tmp_path / "books1" / "raw" / "00.jsonl").write_text('{"text": "abc"}\n', encoding="utf-8")
    assert prepare(request).tokens == 4


def test_a_corpus_from_a_server_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    with serve(Hub({("datasets", "org/name"): {"0.jsonl": content, "1.jsonl.gz": gzip.compress(content)}})) as hub:
        remotes = tuple(Remote(f"{hub.url}/datasets/org/name/resolve/main/{name}", name) for name in ("0.jsonl", "1.jsonl.gz"))
        monkeypatch.setattr(room, "find", lambda name: Corpus(name, "served", urls=remotes))
        request = CorpusRequest(corpus="served", data_dir=tmp_path, tokenizer_type=TokenizerKind.CHAR_LEVEL)
        first = prepare(request)
        assert first.documents == 400 and len(hub.log) == 2
        assert not prepare(request).fresh and len(hub.log) == 2
        (tmp_path / "served" / "served_text_document.idx").unlink()
        assert prepare(request).fresh and len(hub.log) == 2, "the files that are there are used"
        (tmp_path / "served" / "served_text_document.idx").unlink()
        (tmp_path / "served" / "raw" / "0.jsonl").write_bytes(content[:-1])
        with pytest.raises(DataError, match="the checksum is"):
            prepare(request)
        assert prepare(replace(request, again=True)).documents == 400 and len(hub.log) == 4


def test_a_corpus_of_the_hub_is_read_there_unless_files_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Data] = []

    def find_on_hub(data: Data, columns: tuple[str, ...]) -> MadeHere:
        assert columns == ("text",)
        asked.append(data)
        return MadeHere("hub", lambda: [{"text": "from the Hub"}])

    monkeypatch.setattr(corpora, "find_on_hub", find_on_hub)
    request = CorpusRequest(corpus="ubuntu_irc", data_dir=tmp_path, tokenizer_type=TokenizerKind.CHAR_LEVEL)
    assert prepare(request).tokens == len("from the Hub") + 1
    assert asked == [Data(dataset="common-pile/ubuntu_irc")]
    (tmp_path / "ubuntu_irc" / "raw").mkdir()
    (tmp_path / "ubuntu_irc" / "raw" / "log.txt").write_text("by hand", encoding="utf-8")
    assert prepare(replace(request, again=True)).tokens == len("by hand") + 1 and len(asked) == 1


def test_every_name_of_the_reference_is_known() -> None:
    known = {corpus.name for corpus in CORPORA}
    reference = (
        "enron pile_subset pile github arxiv europarl freelaw nih pubmed books1 books3 hackernews openwebtext2 stackexchange ubuntu_irc"
    )
    assert set(reference.split()) | {"youtube_subtitles", "c4", "c4_openwebtext", "enwik8", "pydoc"} == known
    for corpus in CORPORA:
        names = [remote.file_name for remote in corpus.urls]
        assert len(set(names)) == len(names) and all(kind_of(name) for name in names), corpus.name
        assert all(remote.url.endswith(remote.file_name) for remote in corpus.urls), corpus.name
        assert sum(map(bool, (corpus.local, corpus.urls, corpus.hub))) <= 1 and len(corpus.about) > 10, corpus.name
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
