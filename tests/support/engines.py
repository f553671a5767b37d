# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of the kinds that public models use, trained on the golden corpus."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's

DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


def corpus() -> list[str]:
    return [json.loads(line)["text"] for line in (GOLDEN / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]


def golden() -> Engine:
    return Engine.from_file(str(GOLDEN / "tokenizer.json"))


def _byte_level(engine: Engine, *, vocab_size: int) -> Engine:
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(corpus(), trainer=trainer)
    return engine


def neox() -> Engine:
    """NFC, GPT-2's split, runs of spaces as added tokens."""
    engine = Engine(models.BPE())
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine = _byte_level(engine, vocab_size=600)
    engine.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return engine


def deepseek() -> Engine:
    """Three splits one after the other, the last by classes of letters, marks, punctuation and symbols (DeepSeek V3's)."""
    engine = Engine(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in DEEPSEEK]
    engine.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _byte_level(engine, vocab_size=600)


def llama3() -> Engine:
    """Its split, merges ignored for words of the vocabulary, a BOS put in front of every text."""
    engine = Engine(models.BPE(ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine = _byte_level(engine, vocab_size=600)
    engine.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    bos = ("<|begin_of_text|>", engine.token_to_id("<|begin_of_text|>"))
    engine.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="$A $B", special_tokens=[bos])
    return engine


def bracketed() -> Engine:
    """Two tokens before and two behind every text."""
    engine = golden()
    ends = [("<|endoftext|>", 0), ("<|padding|>", 1)]
    engine.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> <|padding|> $A <|padding|> <|endoftext|>", pair="$A $B", special_tokens=ends
    )
    return engine


def llama2() -> Engine:
    """SentencePiece's BPE with bytes for what is not in the vocabulary."""
    engine = Engine(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    engine.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    engine.train_from_iterator(corpus(), trainer=trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    engine.pre_tokenizer = None
    content = json.loads(engine.to_str())
    # The bytes are words of the vocabulary, not tokens that a text may spell.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Engine.from_str(json.dumps(content))


def metaspace() -> Engine:
    """The same vocabulary, spaces marked by the pre-tokenizer."""
    engine = llama2()
    engine.normalizer = None
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return engine


def wordpiece() -> Engine:
    engine = Engine(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer()
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    engine.train_from_iterator(corpus(), trainer=trainer)
    return engine


def unigram() -> Engine:
    engine = Engine(models.Unigram())
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    engine.train_from_iterator(corpus()[:50], trainer=trainer)
    return engine


SUPPORTED: dict[str, Callable[[], Engine]] = {
    "golden": golden, "neox": neox, "llama3": llama3, "deepseek": deepseek, "bracketed": bracketed, "llama2": llama2, "metaspace": metaspace
}  # fmt: skip
UNSUPPORTED: dict[str, Callable[[], Engine]] = {"wordpiece": wordpiece, "unigram": unigram}
