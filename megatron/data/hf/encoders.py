# SPDX-License-Identifier: Apache-2.0
"""Which encoder writes what was found, with which tokenizer and template.

Encoders lie around encoders: records are adapted first, and documents without anything trained within a length are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.chat.masks import Masking
from megatron.data.chat.pairs import PairSource
from megatron.data.chat.sources import ChatFormat, ChatSource, chat_format
from megatron.data.hf.detect import Found, How
from megatron.data.hf.hub import tokenizer_folder
from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.hf.request import Tokens, is_path
from megatron.data.preprocess.blocks import FIRST_RECORDS, BlockStart, RecordSource
from megatron.data.preprocess.encoders import (
    UNTRAINED,
    Dropped,
    EncodedRecords,
    Encoder,
    EncoderSource,
    Fault,
    Ragged,
    StreamFormat,
    TextSource,
)
from megatron.data.preprocess.flags import choose
from megatron.errors import ConfigError
from megatron.hub.client import Sleep
from megatron.tokenizer import TokenizerBackend, TokenizerKind, TokenizerSource, open_tokenizer


class WrappedEncoder:
    """An encoder whose batches are made by a function of the encoder inside and the records."""

    def __init__(self, inner: Encoder, encode: Callable[[Encoder, Sequence[Mapping[str, Any]]], EncodedRecords]) -> None:
        self.inner, self.encode = inner, encode
        self.tokenizer = getattr(inner, "tokenizer", None)
        self.streams: Mapping[str, StreamFormat] = inner.streams

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """The batch."""
        return self.encode(self.inner, records)


@dataclass(frozen=True)
class ShapedSource:
    """Records through `shape`, then through `inner`."""

    shape: RecordAdapter
    inner: EncoderSource

    def open(self) -> WrappedEncoder:
        """Open both."""
        shape = self.shape.open()

        def encode(inner: Encoder, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
            """The inner encoder's batch of the records that could be shaped; numbers are those of `records`."""
            outcomes = [shape(record) for record in records]
            dropped = [(number, outcome.reason) for number, outcome in enumerate(outcomes) if isinstance(outcome, Dropped)]
            faults = [(number, outcome.what) for number, outcome in enumerate(outcomes) if isinstance(outcome, Fault)]
            good = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, dict)}
            numbers, batch = list(good), inner(list(good.values()))
            batch.faults = sorted([*faults, *((numbers[number], what) for number, what in batch.faults)])
            batch.droppings = sorted([*dropped, *((numbers[number], reason) for number, reason in batch.droppings)])
            batch.dropped.update(reason for _, reason in dropped)
            return batch

        return WrappedEncoder(self.inner.open(), encode)


@dataclass(frozen=True)
class LimitedSource:
    """Documents of `inner`; those longer than `max_length` tokens are counted, and left out if none of what remains is trained.

    Nothing is cut: training does that.
    """

    inner: EncoderSource
    max_length: int

    def open(self) -> WrappedEncoder:
        """Open the inner encoder."""
        return WrappedEncoder(self.inner.open(), self._encode)

    def _encode(self, inner: Encoder, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """The inner batch without the documents that lose all they train."""
        batch = inner(records)
        labels = [name for name in inner.streams if name.endswith("_label")]
        mains = [name.removesuffix("_label") for name in labels] or list(inner.streams)
        longest = np.max([batch.streams[name].sizes for name in mains], axis=0)
        long = longest > self.max_length
        if not long.any():
            return batch
        keep = np.ones(len(longest), bool)
        for name in labels:
            keep &= ~long | _trains(batch.streams[name], self.max_length)
        batch.notes[f"documents longer than {self.max_length} tokens"] += int(long[keep].sum())
        if not keep.all():
            _drop(batch, keep, f"nothing to train within {self.max_length} tokens", len(records))
            batch.trained = sum(int((batch.streams[name].values != UNTRAINED).sum()) for name in labels)
        return batch


def _drop(batch: EncodedRecords, keep: NDArray[np.bool_], reason: str, records: int) -> None:
    """Leave out documents of a batch of so many records."""
    gone = {number for number, _ in (*batch.faults, *batch.droppings)}
    kept = [number for number in range(records) if number not in gone]
    lost = [(number, reason) for number, stays in zip(kept, keep.tolist(), strict=True) if not stays]
    batch.droppings = sorted([*batch.droppings, *lost])
    batch.dropped[reason] += len(lost)
    for name, stream in batch.streams.items():
        batch.streams[name] = Ragged(stream.values[np.repeat(keep, stream.sizes)], stream.sizes[keep])


def _trains(labels: Ragged, length: int) -> NDArray[np.bool_]:
    """Whether each document trains one of its first `length` tokens.

    >>> _trains(Ragged(np.array([-100, 5, -100, -100, 7]), np.array([2, 3])), 2).tolist()
    [True, False]
    """
    ends = np.cumsum(labels.sizes, dtype=np.int64)
    trained = np.concatenate([[0], np.cumsum(labels.values != UNTRAINED, dtype=np.int64)])
    starts = ends - labels.sizes
    within: NDArray[np.bool_] = trained[starts + np.minimum(labels.sizes, length)] > trained[starts]
    return within


TEMPLATED = (How.TURNS, How.PAIRS, How.JUDGED, How.RENDERED)
"""What is written with a chat template, and ends where that ends it."""


@dataclass(frozen=True)
class Opened:
    """The tokenizer's files, here. ids: None where none is needed; template: of LABELLED and RENDERED"""

    ids: TokenizerSource | None
    template: ChatFormat | None

    @property
    def digest(self) -> str | None:
        """Of what the ids depend on."""
        return open_tokenizer(replace(self.ids, backend=TokenizerBackend.HF)).digest if self.ids else None


def open_tokens(request: Tokens, how: How, *, ids: bool, wait: Sleep) -> Opened:
    """Tokenizer and template as far as they are needed: `ids`, or templates. wait: for a busy Hub

    Raises ConfigError when one is needed and not given, or when the ids of one are wanted with the template of another.
    """
    templated = how in TEMPLATED
    if not ids and not templated:
        return Opened(None, None)
    name = request.tokenizer or request.template_of
    if name is None:
        raise ConfigError(
            "no tokenizer is given",
            where="--tokenizer",
            fix="add --tokenizer PATH_OR_HUB_NAME, or leave it to later with --skip-count --skip-tokenize (plain text only)",
        )
    path = _here(name, wait)
    if not templated:
        return Opened(TokenizerSource(TokenizerKind.HF, path, backend=request.backend), None)
    speaker = _here(request.template_of, wait) if request.template_of and request.template_of != name else path
    source, other = (TokenizerSource(TokenizerKind.HF, one) for one in (path, speaker))
    if speaker != path and open_tokenizer(source).digest != open_tokenizer(other).digest:
        raise ConfigError(
            f"{name} and {request.template_of} are different tokenizers: the template of one would be written with ids of the other",
            where="--vocab-file and --hf-tokenizer",
            fix="give one of them as --tokenizer, with --chat-template FILE where it has no template of its own",
        )
    return Opened(replace(other, backend=request.backend), chat_format(speaker, request.template))


def _here(name: str, wait: Sleep) -> str:
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if path.suffix or is_path(name):
        raise ConfigError(f"there is no {name}", where="--tokenizer", fix="check the path; a name on the Hub is ORG/NAME")
    return tokenizer_folder(name, wait)


def encoding_of(
    source: RecordSource, found: Found, opened: Opened, *, max_length: int | None, workers: int
) -> tuple[EncoderSource, dict[str, Any]]:
    """The encoder, and what the metadata says of it. The tokenizer's back end is settled on the first records of the source."""
    assert opened.ids is not None  # asked for
    shape = RecordAdapter(found, opened.template)
    inner: EncoderSource
    if opened.template is None:
        chosen = choose(opened.ids, _first_texts(source, shape), workers=workers)
        inner, about = TextSource(chosen.source, append_eod=True, keys=("text",)), {"tokenizer": chosen.about}
    else:
        about = opened.template.about()
        inner = _chat_encoder(found, opened.template)
        if found.how is How.RENDERED:
            renamed = tuple(("text" if role == "messages" else role, column) for role, column in found.columns)
            shape = RecordAdapter(Found(How.TURNS, renamed))
    encoder: EncoderSource = ShapedSource(shape, inner)
    return (LimitedSource(encoder, max_length) if max_length is not None else encoder), about


def _chat_encoder(found: Found, form: ChatFormat) -> EncoderSource:
    if found.how is How.RENDERED:
        # The encoder of conversations sees whether the template has ended the document already.
        return ChatSource(form, ("text",), Masking(labels=False), tools_key="tools")
    roles = dict(found.columns)
    tools = "tools" if "tools" in roles else None
    prompt = "prompt" if "prompt" in roles else None
    if found.how is How.PAIRS:
        return PairSource(form, tools_key=tools)
    if found.how is How.JUDGED:
        # Answers given as text or as one turn are read as answers to a prompt, which may be absent.
        return ChatSource(form, ("messages",), tools_key=tools, reward_key="label", binary=True, prompt_key=prompt)
    return ChatSource(form, ("messages",), tools_key=tools, prompt_key=prompt)


def _first_texts(source: RecordSource, shape: RecordAdapter) -> list[str]:
    """The texts of the first records."""
    make = shape.open()
    shaped = (make(record) for block in source.blocks(BlockStart()) for record in block.read().records)
    return [str(record["text"]) for record in islice(shaped, FIRST_RECORDS) if isinstance(record, dict) and "text" in record]
