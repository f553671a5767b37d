# SPDX-License-Identifier: Apache-2.0
"""Training a BPE tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import ConfigError, DataError
from megatron.tokenizer.hugging_face import open_hf
from megatron.tokenizer.train import save_tokenizer, train_bpe

TEXTS = Path(__file__).read_text(encoding="utf-8").split("\n\n") * 3


def test_same_texts_same_tokenizer_and_every_text_comes_back(tmp_path: Path) -> None:
    engine = train_bpe(TEXTS, vocab_size=400)
    assert engine.to_str() == train_bpe(iter(TEXTS), vocab_size=400).to_str()
    save_tokenizer(engine, tmp_path / "new" / "tokenizer.json")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer = open_hf(str(tmp_path / "new"))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (400, 0, 1)
    for text in [*TEXTS, "", " ", "\n\n\t", "caf\u00e9 \u4f60\u597d \U0001f600", "<|endoftext|>", "\0\x01\x7f"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    merged = [token for token, number in engine.get_vocab().items() if number >= 258]
    assert len(merged) == 400 - 258 and all(len(token) > 1 for token in merged), "all 256 bytes come before the merges"


def test_too_small_a_vocabulary_and_no_text() -> None:
    with pytest.raises(ConfigError, match="256 bytes"):
        train_bpe(TEXTS, vocab_size=257)
    with pytest.raises(DataError, match="no text"):
        train_bpe(["", ""], vocab_size=300)
