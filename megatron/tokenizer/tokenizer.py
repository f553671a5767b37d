# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is: the protocol, its kinds and its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError


class TokenizerKind(str, Enum):
    """Tokenizer families; values are the `tokenizer_type` key's."""

    GPT2_BPE = "GPT2BPETokenizer"
    HF = "HFTokenizer"
    HF_GPT2 = "HFGPT2Tokenizer"
    SPM = "SPMTokenizer"
    CHAR_LEVEL = "CharLevelTokenizer"
    TIKTOKEN = "TiktokenTokenizer"


class TokenizerBackend(str, Enum):
    """Which library runs a tokenizer. The ids are the same whichever does, or the run stops."""

    AUTO = "auto"  # gigatoken where `select_backend` finds that it gives the same ids, else hf
    HF = "hf"  # the family's own library
    GIGATOKEN = "gigatoken"


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from. Small and picklable, so every process opens its own.

    vocab_file: file, folder or name, as the family needs it; merge_file: GPT2_BPE only
    backend:    not part of the `repr`, which says what ids depend on
    """

    kind: TokenizerKind
    vocab_file: str | None = None
    merge_file: str | None = None
    backend: TokenizerBackend = field(default=TokenizerBackend.HF, repr=False)


class RaggedIds(NamedTuple):
    """Ids of several texts back to back: ids [sum of sizes], sizes [texts]."""

    ids: NDArray[np.uint32]
    sizes: NDArray[np.int32]


class UnencodableText(DataError):
    """A text that no tokenizer can encode: it holds half of a surrogate pair. `number` is its place in the batch."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        place = _lone_surrogate(text)
        super().__init__(
            f"text {number} of the batch is not Unicode text: half of a surrogate pair, U+{ord(text[place]):04X}, at character {place}",
            fix="drop the document, or fix it where it was cut (JSON escapes such as \\ud83d come in pairs)",
        )


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> ids.

    name:       the `tokenizer_type` it answers to
    vocab_size: largest id + 1, added tokens included
    eod:        id that ends a document
    pad, bos:   ids, or None where the tokenizer has none
    digest:     sha256 of everything the ids depend on (files, or the name of a built-in vocabulary)
    """

    name: str
    vocab_size: int
    eod: int
    pad: int | None
    bos: int | None
    digest: str

    def encode(self, text: str) -> list[int]:
        """Ids of one text; nothing is appended."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order; equal to `encode` on each."""
        return [self.encode(text) for text in texts]

    def encode_ragged(self, texts: Sequence[str]) -> RaggedIds:
        """The ids of `encode_batch` in one array."""
        return ragged(self.encode_batch(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out; bytes that are not UTF-8 become U+FFFD."""


def padded_vocab_size(size: int, divisible_by: int, tp: int) -> int:
    """Smallest multiple of `divisible_by * tp` that is >= `size`: the rows of the embedding.

    >>> padded_vocab_size(50277, 128, 1), padded_vocab_size(512, 128, 4), padded_vocab_size(513, 128, 4)
    (50304, 512, 1024)
    """
    step = divisible_by * tp
    return -(-size // step) * step


def existing(path: str | Path | None, key: str, *, kind: str, fix: str) -> Path:
    """`path` if it is there, else a DataError that names the configuration key."""
    if path is None:
        raise DataError(f"{kind} needs `{key}`", where=key, fix=fix)
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"{kind}: there is no {found}", where=key, fix=fix)
    return found


def ragged(ids: Sequence[Sequence[int]]) -> RaggedIds:
    """Lists of ids as arrays.

    >>> [part.tolist() for part in ragged([[5, 6], [], [7]])]
    [[5, 6, 7], [2, 0, 1]]
    """
    sizes = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
    return RaggedIds(np.fromiter(chain.from_iterable(ids), dtype=np.uint32, count=int(sizes.sum(dtype=np.int64))), sizes)


def spans(texts: Sequence[str], characters: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of texts with about that many characters each.

    >>> list(spans(["ab", "c", "defg", "h"], 3))
    [(0, 2), (2, 3), (3, 4)]
    """
    first = total = 0
    for i, text in enumerate(texts):
        total += len(text)
        if total >= characters:
            yield first, i + 1
            first, total = i + 1, 0
    if first < len(texts):
        yield first, len(texts)


def encodable(text: str) -> bool:
    """Whether a text is Unicode text, without lone surrogates."""
    return text.isascii() or _lone_surrogate(text) < 0


def require_encodable(texts: Sequence[str], first: int = 0) -> None:
    """Raise UnencodableText for the first text that is not; `first` is the number of texts[0] in the caller's batch."""
    for number, text in enumerate(texts, first):
        if not encodable(text):
            raise UnencodableText(number, text)


def _lone_surrogate(text: str) -> int:
    """Where the first is, or -1."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return -1


def digest_of(*parts: Path | str) -> str:
    """sha256 over files (their bytes) and strings, in order."""
    total = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()
