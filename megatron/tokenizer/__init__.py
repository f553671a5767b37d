# SPDX-License-Identifier: Apache-2.0
"""Text <-> ids, whatever library does it. Knows no configuration object outside build.py."""

from megatron.tokenizer.registry import open_tokenizer
from megatron.tokenizer.tokenizer import Tokenizer, TokenizerKind, TokenizerSource, padded_vocab_size

__all__ = ["Tokenizer", "TokenizerKind", "TokenizerSource", "open_tokenizer", "padded_vocab_size"]
