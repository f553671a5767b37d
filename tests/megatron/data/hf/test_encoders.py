# SPDX-License-Identifier: Apache-2.0
"""Encoders around encoders: the right records keep their numbers, and a limit drops exactly what it leaves untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.hf.detect import Found, How
from megatron.data.hf.encoders import LimitedSource, ShapedSource
from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.preprocess.encoders import UNTRAINED, Dropped, EncodedRecords, Fault, StreamFormat, gather

STREAMS = {"messages": StreamFormat(np.dtype("<i4")), "messages_label": StreamFormat(np.dtype("<i4"))}


@dataclass(frozen=True)
class Given:
    """An encoder that takes labels as they are given; None is a fault, [] is dropped."""

    def open(self) -> Given:
        return self

    @property
    def streams(self) -> Mapping[str, StreamFormat]:
        return STREAMS

    def __call__(self, records: Sequence[Any]) -> EncodedRecords:
        outcomes = []
        for record in records:
            labels = record["messages"] if isinstance(record, dict) else record
            if labels is None:
                outcomes.append(Fault("none"))
            elif not labels:
                outcomes.append(Dropped("empty"))
            else:
                outcomes.append({"messages": np.abs(labels), "messages_label": np.array(labels)})
        return gather(outcomes, STREAMS, trained=0)


labels = st.lists(st.sampled_from([UNTRAINED, 3, 4]), max_size=6)


@settings(max_examples=60)
@given(st.lists(st.one_of(st.none(), labels), max_size=8), st.integers(1, 6))
def test_a_limit_drops_what_trains_nothing_within_it(records: list[list[int] | None], limit: int) -> None:
    batch = LimitedSource(Given(), limit).open()(records)
    # What is within the limit is left to the inner encoder.
    documents = [(number, one) for number, one in enumerate(records) if one]
    lost = [number for number, one in documents if len(one) > limit and all(label == UNTRAINED for label in one[:limit])]
    kept = [one for number, one in documents if number not in lost]
    assert batch.streams["messages"].sizes.tolist() == [len(one) for one in kept]
    assert batch.streams["messages_label"].values.tolist() == [label for one in kept for label in one]
    assert [number for number, why in batch.droppings if "within" in why] == lost
    assert batch.dropped[f"nothing to train within {limit} tokens"] == len(lost)
    assert batch.notes[f"documents longer than {limit} tokens"] == sum(len(one) > limit for one in kept)
    assert [number for number, _ in batch.faults] == [number for number, one in enumerate(records) if one is None]


def test_numbers_of_shaped_records_are_those_of_the_input() -> None:
    shape = RecordAdapter(Found(How.TEXT, (("text", "x"),)))

    @dataclass(frozen=True)
    class Lengths(Given):
        def open(self) -> Lengths:
            return self

        def __call__(self, records: Sequence[Any]) -> EncodedRecords:
            return super().__call__([[3] * len(record["text"]) if record["text"] != "bad" else None for record in records])

    records = [{"x": None}, {"x": "ab"}, {"y": 1}, {"x": ""}, {"x": "bad"}, {"x": "c"}, {"x": None}]
    batch = ShapedSource(shape, Lengths()).open()(records)
    assert batch.streams["messages"].sizes.tolist() == [2, 1]
    assert [number for number, _ in batch.faults] == [2, 4]
    assert batch.droppings == [(0, "empty"), (3, "empty"), (6, "empty")] and batch.dropped["empty"] == 3
