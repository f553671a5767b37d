# SPDX-License-Identifier: Apache-2.0
"""From a TokenizerSource to an open tokenizer, and how many threads its library uses."""

from __future__ import annotations

import os

from megatron.tokenizer.gigatoken_backend import GigatokenTokenizer, engine_of
from megatron.tokenizer.hugging_face import open_gpt2_bpe, open_hf, open_hf_gpt2
from megatron.tokenizer.others import CharLevelTokenizer, SPMTokenizer, TiktokenTokenizer
from megatron.tokenizer.tokenizer import Tokenizer, TokenizerBackend, TokenizerKind, TokenizerSource


def open_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Open the tokenizer. Raises DataError or BackendError that name the key at fault."""
    if source.backend is TokenizerBackend.AUTO:
        raise ValueError("the backend `auto` has to be settled before a tokenizer is opened: select_backend(source, texts)")
    family = open_family(source)
    return family if source.backend is TokenizerBackend.HF else GigatokenTokenizer(engine_of(family))


def open_family(source: TokenizerSource) -> Tokenizer:
    """The tokenizer, run by its family's own library."""
    if source.kind is TokenizerKind.HF:
        return open_hf(source.vocab_file)
    if source.kind is TokenizerKind.GPT2_BPE:
        return open_gpt2_bpe(source.vocab_file, source.merge_file)
    if source.kind is TokenizerKind.HF_GPT2:
        return open_hf_gpt2(source.vocab_file)
    if source.kind is TokenizerKind.SPM:
        return SPMTokenizer(source.vocab_file)
    if source.kind is TokenizerKind.TIKTOKEN:
        return TiktokenTokenizer(source.vocab_file)
    return CharLevelTokenizer()


def set_library_threads(number: int) -> None:
    """Threads of `tokenizers` and gigatoken in this process and those it starts.

    Both read the environment when they are first used, once: call this before. A process started by multiprocessing uses gigatoken on
    one thread whatever the number, so work is divided over processes, not threads.
    """
    os.environ["RAYON_NUM_THREADS"] = str(number)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if number > 1 else "false"
