# SPDX-License-Identifier: Apache-2.0
"""Text <-> ids, whatever library does it."""

from megatron.tokenizer.registry import open_tokenizer, select_backend, set_library_threads
from megatron.tokenizer.tokenizer import Tokenizer, TokenizerBackend, TokenizerKind, TokenizerSource

__all__ = ["Tokenizer", "TokenizerBackend", "TokenizerKind", "TokenizerSource", "open_tokenizer", "select_backend", "set_library_threads"]
