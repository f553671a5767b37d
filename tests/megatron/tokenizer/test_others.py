# SPDX-License-Identifier: Apache-2.0
"""SentencePiece, tiktoken and bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import DataError
from megatron.tokenizer import Tokenizer, TokenizerKind, TokenizerSource, open_tokenizer
from megatron.tokenizer.others import CharLevelTokenizer, SPMTokenizer, TiktokenTokenizer
from megatron.tokenizer.tokenizer import UnencodableText

TEXTS = [
    f"the {word} runs over the {other} dog {number}" for number, (word, other) in enumerate([("quick", "lazy"), ("brown", "old")] * 20)
]


def trained(folder: Path, name: str, **options: object) -> Path:
    import sentencepiece

    prefix = folder / name
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=60, hard_vocab_limit=False, minloglevel=2, **options
    )
    return prefix.with_suffix(".model")


def test_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    own_end = trained(tmp_path, "own", user_defined_symbols=["<|endoftext|>"])
    model = sentencepiece.SentencePieceProcessor(model_file=str(own_end))
    tokenizer = open_tokenizer(TokenizerSource(TokenizerKind.SPM, str(own_end)))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode_batch(TEXTS) == model.encode(TEXTS)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS
    ragged = tokenizer.encode_ragged(TEXTS)
    assert ragged.ids.tolist() == sum(model.encode(TEXTS), []) and ragged.sizes.tolist() == list(map(len, model.encode(TEXTS)))
    assert tokenizer.vocab_size == len(model)
    assert tokenizer.eod == model.piece_to_id("<|endoftext|>") and tokenizer.pad is None and tokenizer.bos == model.bos_id()
    assert tokenizer.decode([*tokenizer.encode("the dog"), tokenizer.vocab_size + 5]) == "the dog"
    plain = SPMTokenizer(str(trained(tmp_path, "plain")))
    assert plain.eod == 2 and plain.digest != tokenizer.digest
    with pytest.raises(DataError, match="neither a piece"):
        SPMTokenizer(str(trained(tmp_path, "endless", eos_id=-1)))
    with pytest.raises(UnencodableText, match="text 1 of the batch"):
        tokenizer.encode_ragged(["the dog", "\udc00"])
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        SPMTokenizer(str(tmp_path / "bad.model"))


def test_tiktoken_offline_and_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    with pytest.raises(DataError, match="no encoding 'nothing'") as caught:
        TiktokenTokenizer("nothing")
    assert "cl100k_base" in (caught.value.fix or "")
    with pytest.raises(DataError, match="needs `vocab_file`"):
        TiktokenTokenizer(None)

    def refuse(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(DataError, match="could not be fetched: ConnectionError") as caught:
        TiktokenTokenizer("gpt2")
    assert "TIKTOKEN_CACHE_DIR" in (caught.value.fix or "")
    # A small encoding of our own: bytes, one merge, and the end of text after a gap.
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    small = tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    tokenizer = TiktokenTokenizer("gpt2")
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (301, 300, None)
    assert tokenizer.encode_batch(["ab a", "b"]) == [[256, 32, 97], [98]]
    assert [part.tolist() for part in tokenizer.encode_ragged(["ab a", "", "b"])] == [[256, 32, 97, 98], [3, 0, 1]]
    assert 300 not in tokenizer.encode("<|endoftext|>"), "text stays text"
    assert tokenizer.decode([256, 280, 32, 97, 5000]) == "ab a"


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=2, exclude_categories=["Cs"])))
def test_bytes_come_back(text: str) -> None:
    tokenizer = CharLevelTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(text)
    assert [part.tolist() for part in tokenizer.encode_ragged([text, "b"])] == [[*ids, 98], [len(ids), 1]]
    assert ids == list(text.encode()) and tokenizer.decode([*ids, tokenizer.eod, tokenizer.pad or 1, 400]) == text


def test_a_document_cannot_spell_the_end() -> None:
    assert CharLevelTokenizer().encode("a\0b\1c") == [97, 98, 99]


def test_opening_a_tokenizer_imports_no_torch() -> None:
    code = (
        "import sys, megatron.tokenizer, megatron.data.hf.prepare_corpus; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3], timeout=60
    )
    assert said.stdout.strip() == "[]"
