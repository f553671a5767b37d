# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the `tokenizers` library: recorded ids, parity with transformers, special tokens, errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.errors import DataError
from megatron.tokenizer import Tokenizer, TokenizerKind, TokenizerSource, open_tokenizer
from megatron.tokenizer.hugging_face import open_gpt2_bpe, open_hf, open_hf_gpt2
from megatron.tokenizer.train import save_tokenizer, train_bpe

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer"
# Recorded from the reference: corpus.jsonl, eod after each document, empty ones left out.
RECORDED_SHA256 = "de64bb5be720f274f846a734209fc1256ff3a511357df28c2d43a0324089da8d"


def texts() -> list[str]:
    return [json.loads(line)["text"] for line in (GOLDEN / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]


def copied(folder: Path, *, config: dict[str, Any] | None = None, **edits: Any) -> Path:
    """tokenizer.json with some of its fields replaced, and a tokenizer_config.json if one is given."""
    folder.mkdir(exist_ok=True)
    content = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    content.update(edits)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_ids_equal_the_recording_and_decode_to_the_text() -> None:
    tokenizer = open_tokenizer(TokenizerSource(TokenizerKind.HF, str(GOLDEN)))
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eod, tokenizer.pad, tokenizer.bos) == ("HFTokenizer", 512, 0, 1, 0)
    documents = tokenizer.encode_batch(texts())
    stored = [np.array([*ids, tokenizer.eod], dtype=np.uint16) for ids in documents if ids]
    assert hashlib.sha256(np.concatenate(stored).tobytes()).hexdigest() == RECORDED_SHA256
    assert [tokenizer.decode(ids) for ids in documents] == texts()
    assert tokenizer.encode(texts()[3]) == documents[3]


@pytest.mark.parametrize("at_a_time", [1, 300, 2**20])
def test_ids_in_one_array(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.tokenizer.hugging_face.AT_A_TIME", at_a_time)
    tokenizer = open_hf(str(GOLDEN))
    ids, sizes = tokenizer.encode_ragged(["", *texts(), ""])
    documents = [tokenizer.encode(text) for text in ["", *texts(), ""]]
    assert (ids.dtype, sizes.dtype) == (np.uint32, np.int32)
    assert ids.tolist() == sum(documents, []) and sizes.tolist() == list(map(len, documents))
    assert [len(part) for part in tokenizer.encode_ragged([])] == [0, 0]
    assert [len(part) for part in tokenizer.encode_ragged([""])] == [0, 1]


def test_file_and_folder_are_one_tokenizer() -> None:
    file, folder = open_hf(str(GOLDEN / "tokenizer.json")), open_hf(str(GOLDEN))
    assert file.digest == folder.digest
    assert file.encode("a <|endoftext|> b") == folder.encode("a <|endoftext|> b")
    assert 0 in file.encode("a <|endoftext|> b"), "text that spells a special token becomes it, as in the reference"


def test_equal_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Tokenizer

    samples = [text for text in texts() if "<|" not in text][:60]
    theirs = AutoTokenizer.from_pretrained(GOLDEN)
    ours = open_hf(str(GOLDEN))
    assert ours.encode_batch(texts()) == theirs(texts())["input_ids"]
    assert (ours.eod, ours.pad, ours.bos) == (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id)
    trained = tmp_path / "trained"
    save_tokenizer(train_bpe(samples, vocab_size=300), trained / "tokenizer.json")
    theirs, ours = AutoTokenizer.from_pretrained(trained), open_hf(str(trained))
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1) and theirs(samples)["input_ids"] == ours.encode_batch(samples)
    model = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    slow = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    gpt2 = open_gpt2_bpe(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    expected = [slow(text)["input_ids"] for text in samples]
    assert gpt2.encode_batch(samples) == expected
    assert (gpt2.vocab_size, gpt2.eod, gpt2.pad) == (512, 0, 1)
    assert gpt2.eod not in gpt2.encode("a<|endoftext|>b"), "ordinary text in this family"
    assert gpt2.decode(gpt2.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    folder = open_hf_gpt2(str(tmp_path))
    assert folder.encode_batch(samples) == expected
    assert folder.eod == 0 and folder.eod in folder.encode("a<|endoftext|>b")


@pytest.mark.parametrize(
    ("config", "eod", "pad"),
    [
        ({"eos_token": "<|padding|>", "pad_token": "<|endoftext|>"}, 1, 0),
        ({"eos_token": {"content": "<|padding|>", "lstrip": False}}, 1, 1),
        ({"eos_token": None}, 0, 1),
        (None, 0, 1),
    ],
)
def test_special_tokens_come_from_the_files(tmp_path: Path, config: dict[str, Any] | None, eod: int, pad: int) -> None:
    tokenizer = open_hf(str(copied(tmp_path, config=config)))
    assert (tokenizer.eod, tokenizer.pad) == (eod, pad)


def test_tokenizer_config_wins_over_special_tokens_map_and_digest_sees_both(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    plain = open_hf(str(folder)).digest
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|padding|>"}', encoding="utf-8")
    mapped = open_hf(str(folder))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
    both = open_hf(str(folder))
    assert (mapped.eod, both.eod) == (1, 0)
    assert len({plain, mapped.digest, both.digest}) == 3


def test_other_names_for_the_end(tmp_path: Path) -> None:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordinary = {**special, "special": False}
    added = [{"id": 512, "content": "<|endoftext|>", **ordinary}, {"id": 600, "content": "</s>", **special}]
    model = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    model["vocab"].pop("<|endoftext|>")
    tokenizer = open_hf(
        str(copied(tmp_path, added_tokens=added, model={**model, "vocab": {**model["vocab"], "</s>": 600, "<|endoftext|>": 512}}))
    )
    assert (tokenizer.eod, tokenizer.pad) == (600, None), "only special tokens are looked through"
    assert tokenizer.vocab_size == 601, "ids have a gap, and the largest needs a row"


def test_limits_saved_in_the_file_do_not_cut_documents(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": {"Fixed": 900},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|padding|>",
    }
    tokenizer = open_hf(str(copied(tmp_path, truncation=cut, padding=fill)))
    assert tokenizer.encode_batch(texts()[:5]) == open_hf(str(GOLDEN)).encode_batch(texts()[:5])


def test_every_failure_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("", encoding="utf-8")
    nameless = copied(tmp_path / "nameless", added_tokens=[])
    wrong = copied(tmp_path / "wrong", config={"eos_token": "<|nowhere|>"})
    merges = tmp_path / "merges"
    merges.mkdir()
    (merges / "merges.txt").write_text("", encoding="utf-8")
    cases = [
        (lambda: open_hf(None), "needs `vocab_file`", "tokenizer.json"),
        (lambda: open_hf(str(tmp_path / "absent.json")), "there is no", "tokenizer.json"),
        (lambda: open_hf(str(tmp_path / "empty.json")), "is not a tokenizer.json", "broken download"),
        (lambda: open_hf(str(merges)), "holds no tokenizer.json", "GPT2BPETokenizer"),
        (lambda: open_hf(str(nameless)), "no end-of-document token", "eos_token"),
        (lambda: open_hf(str(wrong)), "is not in the vocabulary", "one folder per tokenizer"),
        (lambda: open_gpt2_bpe(str(tmp_path / "empty.json"), str(tmp_path / "empty.json")), "are not a BPE vocabulary", "download"),
        (lambda: open_gpt2_bpe(str(tmp_path / "empty.json"), None), "needs `merge_file`", "merges.txt"),
        (lambda: open_hf_gpt2(str(merges)), "holds neither", "folder"),
        (lambda: open_hf_gpt2("no-such-user/no-such-tokenizer"), "no folder no-such-user/no-such-tokenizer", "offline"),
    ]
    for call, what, fix in cases:
        with pytest.raises(DataError) as caught:
            call()
        assert what in caught.value.what and fix in (caught.value.fix or ""), caught.value.report()


def test_a_folder_without_padding_token_gets_one(tmp_path: Path) -> None:
    added = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"][:1]
    folder = copied(tmp_path, added_tokens=added)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: number for token, number in content["model"]["vocab"].items() if token != "<|padding|>"}
    content["model"]["vocab"] = vocab
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = open_hf_gpt2(str(folder))
    assert tokenizer.pad == tokenizer.vocab_size - 1 and tokenizer.decode([tokenizer.pad]) == "<|padding|>"
    shutil.rmtree(folder)
