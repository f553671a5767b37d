# SPDX-License-Identifier: Apache-2.0
"""The first documents of an encoder as a person reads them. Knows no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from megatron.data.chat.pairs import LENGTHS, PairEncoder
from megatron.data.chat.sources import ChatEncoder
from megatron.data.preprocess.encoders import UNTRAINED
from megatron.tokenizer.spans import SpanTokenizer

SHOWN_TOKENS = 300


def preview(encoder: ChatEncoder | PairEncoder, records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Stream -> the text of the first record that gives documents, with [[ ]] around what is trained; empty if none does."""
    for record in records:
        streams = encoder([record]).streams
        if any(len(stream.sizes) for stream in streams.values()):
            names = [name for name in streams if not name.endswith(("_label", "_reward")) and name != LENGTHS]
            return {
                name: shown(encoder.tokenizer, streams[name].values, streams[f"{name}_label"].values if f"{name}_label" in streams else ())
                for name in names
            }
    return {}


def shown(tokenizer: SpanTokenizer, ids: Iterable[int], labels: Iterable[int]) -> str:
    """The text of the first SHOWN_TOKENS ids, with [[ ]] around what is trained."""
    numbers, marks = list(map(int, ids)), [label != UNTRAINED for label in labels]
    marks = marks or [False] * len(numbers)
    runs = groupby(zip(numbers[:SHOWN_TOKENS], marks[:SHOWN_TOKENS], strict=True), key=lambda pair: pair[1])
    text = "".join(f"[[{part}]]" if trained else part for trained, run in runs for part in [tokenizer.decode([one for one, _ in run])])
    return text + (f" ... ({len(numbers) - SHOWN_TOKENS} more tokens)" if len(numbers) > SHOWN_TOKENS else "")
