# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is: the protocol, its kinds and its files. Knows no tokenizer library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, runtime_checkable

from megatron.errors import DataError


class TokenizerKind(str, Enum):
    """Tokenizer families; values are the `tokenizer_type` key's."""

    GPT2_BPE = "GPT2BPETokenizer"
    HF = "HFTokenizer"
    HF_GPT2 = "HFGPT2Tokenizer"
    SPM = "SPMTokenizer"
    CHAR_LEVEL = "CharLevelTokenizer"
    TIKTOKEN = "TiktokenTokenizer"


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from. Small and picklable, so every process opens its own.

    vocab_file: file, folder or name, as the family needs it; merge_file: GPT2_BPE only
    """

    kind: TokenizerKind
    vocab_file: str | None = None
    merge_file: str | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> ids.

    name:       the `tokenizer_type` it answers to
    vocab_size: largest id + 1, added tokens included
    eod:        id that ends a document
    pad, bos:   ids, or None where the tokenizer has none
    digest:     sha256 of everything the ids depend on (files, or the name of a built-in vocabulary)
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    @property
    def pad(self) -> int | None: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def digest(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of one text; nothing is appended."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order; equal to `encode` on each."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out; bytes that are not UTF-8 become U+FFFD."""
        ...


def padded_vocab_size(size: int, divisible_by: int, tp: int) -> int:
    """Smallest multiple of `divisible_by * tp` that is >= `size`: the rows of the embedding.

    >>> padded_vocab_size(50277, 128, 1), padded_vocab_size(512, 128, 4), padded_vocab_size(513, 128, 4)
    (50304, 512, 1024)
    """
    step = divisible_by * tp
    return -(-size // step) * step


def existing(path: str | Path | None, key: str, *, kind: str, mend: str) -> Path:
    """`path` if it is there, else a DataError that names the configuration key."""
    if path is None:
        raise DataError(f"{kind} needs `{key}`", where=key, mend=mend)
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"{kind}: there is no {found}", where=key, mend=mend)
    return found


def digest_of(*parts: Path | str) -> str:
    """sha256 over files (their bytes) and strings, in order."""
    total = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()
