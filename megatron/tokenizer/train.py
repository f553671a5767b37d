# SPDX-License-Identifier: Apache-2.0
"""Training a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909, on bytes)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.atomic_io import write_durably
from megatron.errors import ConfigError, DataError
from megatron.log import get_logger

log = get_logger(__name__)

EOD, PAD = "<|endoftext|>", "<|padding|>"
SMALLEST = 256 + 2  # every byte and the two special tokens


def train_bpe(texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2) -> Engine:
    """A byte-level BPE tokenizer; the same texts give the same tokenizer.

    `<|endoftext|>` is 0, `<|padding|>` 1, then the 256 bytes, then merges, most frequent first. No normaliser, so
    decode(encode(text)) == text. Raises ConfigError for a vocabulary that cannot hold the bytes, DataError without text.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and 2 special tokens", where="vocab_size", fix=f"at least {SMALLEST}"
        )
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[EOD, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    engine.train_from_iterator(counted(), trainer=trainer)
    if characters == 0:
        raise DataError(
            "there is no text to train a tokenizer on", where="input", fix="check the input files and the key that holds their text"
        )
    if engine.get_vocab_size() < vocab_size:
        log.warning("the texts (%d characters) support only %d of %d ids", characters, engine.get_vocab_size(), vocab_size)
    return engine


def save_tokenizer(engine: Engine, path: Path) -> None:
    """Write tokenizer.json at `path` and tokenizer_config.json beside it; each appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "bos_token": EOD,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    write_durably(path.parent / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    write_durably(path, engine.to_str(pretty=True))
