# SPDX-License-Identifier: Apache-2.0
"""Text <-> ids, whatever library does it."""

from megatron.tokenizer.registry import Settled, open_tokenizer, select_backend, set_library_threads, settle_open
from megatron.tokenizer.tokenizer import (
    RaggedIds,
    Tokenizer,
    TokenizerBackend,
    TokenizerKind,
    TokenizerSource,
    UnencodableText,
    padded_vocab_size,
)

__all__ = [
    "RaggedIds",
    "Settled",
    "Tokenizer",
    "TokenizerBackend",
    "TokenizerKind",
    "TokenizerSource",
    "UnencodableText",
    "open_tokenizer",
    "padded_vocab_size",
    "set_library_threads",
    "select_backend",
    "settle_open",
]
