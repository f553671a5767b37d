# SPDX-License-Identifier: Apache-2.0
"""Text -> ids with the characters each id stands for, nothing added. Knows no templates and no masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Engine

from megatron.tokenizer.hugging_face import AT_A_TIME, open_hf
from megatron.tokenizer.tokenizer import spans


class Spans(NamedTuple):
    """ids [n] int32 of one text; token i stands for the characters starts[i] to ends[i] (several tokens may share a character)."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class SpanTokenizer:
    """A `tokenizer.json` without its post-processor: no BOS is put in front, and no space is cut from a token's characters.

    Text that spells a special token becomes that token, as chat templates expect. `special`: the ids of those.
    """

    def __init__(self, path: str) -> None:
        plain = open_hf(path)
        self.eod = plain.eod
        self.vocab_size = plain.vocab_size
        self.digest = plain.digest
        self._engine = Engine.from_str(plain.content())
        self._engine.post_processor = None
        self.special = frozenset(number for number, token in self._engine.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> Spans:
        """One text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Spans]:
        """Several texts, in order. Every text must be encodable."""
        found: list[Spans] = []
        for first, last in spans(texts, AT_A_TIME):
            found += [_spans(encoding) for encoding in self._engine.encode_batch(list(texts[first:last]), add_special_tokens=False)]
        return found

    def encode_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Only the ids of several texts, which takes half the time."""
        found: list[NDArray[np.int32]] = []
        for first, last in spans(texts, AT_A_TIME):
            encodings = self._engine.encode_batch_fast(list(texts[first:last]), add_special_tokens=False)
            found += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens written out."""
        return str(self._engine.decode([int(number) for number in ids], skip_special_tokens=False))

    def is_space(self, number: int) -> bool:
        """Whether the token is nothing but white space."""
        return self.decode([number]).isspace()


def _spans(encoding: Any) -> Spans:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return Spans(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])
