# SPDX-License-Identifier: Apache-2.0
"""From a record to the ids of each stream it feeds. Knows tokenizers, no files and no processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed_dataset import best_dtype
from megatron.tokenizer import Tokenizer, TokenizerSource, open_tokenizer

Encoded = Mapping[str, NDArray[Any]]


class Encoder(Protocol):
    """Records -> documents. `streams` names every stream and the dtype it is stored in."""

    @property
    def streams(self) -> Mapping[str, np.dtype[Any]]: ...

    def __call__(self, records: Sequence[Any]) -> list[Encoded | None]:
        """One {stream: ids [n]} per record, None for a record that gives no document."""
        ...


class EncoderSource(Protocol):
    """How to open an encoder in another process: small, picklable, hashable."""

    def __hash__(self) -> int: ...
    def open(self) -> Encoder: ...


@dataclass(frozen=True)
class TextSource:
    """Plain text into one stream; `append_eod` ends every document with the tokenizer's eod."""

    tokenizer: TokenizerSource
    append_eod: bool = True
    stream: str = "text"

    def open(self) -> TextEncoder:
        """Open the tokenizer."""
        return TextEncoder(open_tokenizer(self.tokenizer), append_eod=self.append_eod, stream=self.stream)


class TextEncoder:
    """Texts -> ids of one stream. A text without any token is no document."""

    def __init__(self, tokenizer: Tokenizer, *, append_eod: bool, stream: str = "text") -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.dtype = best_dtype(tokenizer.vocab_size)
        self.tail = [tokenizer.eod] if append_eod else []

    @property
    def streams(self) -> Mapping[str, np.dtype[Any]]:
        """The one stream and its dtype."""
        return {self.stream: self.dtype}

    def __call__(self, records: Sequence[str]) -> list[Encoded | None]:
        """Ids [n] of each text, eod included."""
        encoded = self.tokenizer.encode_batch(records)
        return [{self.stream: np.array(ids + self.tail, dtype=self.dtype)} if ids else None for ids in encoded]
