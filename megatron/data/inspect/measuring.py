# SPDX-License-Identifier: Apache-2.0
"""The lengths of records before any dataset is written: a source through an encoder, of which only the sizes are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.data.inspect.inspecting import first_trained
from megatron.data.inspect.lengths import Lengths, of_pairs
from megatron.data.preprocess.blocks import BlockStart
from megatron.data.preprocess.encoders import EncodedRecords, Encoder, EncoderSource
from megatron.data.preprocess.encoding_pool import Done, EncodingPool, encode, usable_cores
from megatron.data.preprocess.sources import RecordSource
from megatron.errors import DataError
from megatron.tokenizer import set_library_threads

LENGTHS = "lengths"
"""The stream of preference pairs with the tokens of the prompt and of both answers."""


class Measured(NamedTuple):
    """lengths: of the records that give a sample; left_out: reason -> records that give none"""

    lengths: Lengths
    left_out: Counter[str]


def measure(source: RecordSource, encoder_source: EncoderSource, *, workers: int = 1, skip_bad: int = 0) -> Measured:
    """Encode every record. Raises DataError for more than `skip_bad` malformed ones."""
    parts: list[Lengths] = []
    left_out: Counter[str] = Counter()
    for done in _encoded(source, encoder_source, workers):
        if done.num_faults:
            left_out["malformed"] += done.num_faults
            if left_out["malformed"] > skip_bad:
                where, what = done.faults[0]
                raise DataError(what, where=where, fix="fix or remove the record, or leave some out with --skip-bad N")
        left_out += done.batch.dropped
        if done.batch.documents:
            parts.append(_lengths(done.batch))
    if not parts:
        raise DataError("no record gives a sample", fix="check the input and its keys")
    prompts = [part.prompt for part in parts if part.prompt is not None]
    return Measured(Lengths(np.concatenate([part.rows for part in parts]), np.concatenate(prompts) if prompts else None), left_out)


def _encoded(source: RecordSource, encoder_source: EncoderSource, workers: int) -> Iterator[Done]:
    blocks = source.blocks(BlockStart())
    if workers == 1:
        set_library_threads(usable_cores())
        encoder: Encoder = encoder_source.open()
        for block in blocks:
            yield encode(block, encoder)
        return
    with EncodingPool(encoder_source, workers) as pool:
        yield from pool.encoded(blocks)


def _lengths(batch: EncodedRecords) -> Lengths:
    """Pairs tell their lengths themselves; else the first stream is one of tokens."""
    if LENGTHS in batch.streams:
        prompt, chosen, rejected = batch.streams[LENGTHS].values.astype(np.int64).reshape(-1, 3).T
        return of_pairs(prompt, prompt + chosen, prompt + rejected)
    key = next(iter(batch.streams))
    rows = batch.streams[key].sizes.astype(np.int64)[:, None]
    labels = batch.streams.get(f"{key}_label")
    prompt_of: NDArray[np.int64] | None = None if labels is None else first_trained(labels.values, labels.sizes)[:, None]
    return Lengths(rows, prompt_of)
