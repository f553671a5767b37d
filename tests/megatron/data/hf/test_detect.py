# SPDX-License-Identifier: Apache-2.0
"""What the first records are taken for."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.data.hf.detect import How, detect
from megatron.data.hf.request import As, Columns
from megatron.errors import DataError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
KTO = {"prompt": "q", "completion": "a", "label": True}

CASES: list[tuple[dict[str, Any], Columns, How, tuple[str, ...]]] = [
    ({"text": "a", "messages": TURNS}, Columns(), How.TEXT, ("text",)),
    ({"text": None, "messages": TURNS}, Columns(), How.TURNS, ("messages",)),
    ({"text": None, "id": 1}, Columns(), How.TEXT, ("text",)),
    ({"id": 1, "messages": TURNS}, Columns(), How.TURNS, ("messages",)),
    ({"messages": TURNS, "tools": "[]"}, Columns(), How.TURNS, ("messages", "tools")),
    ({"conversations": SHARED}, Columns(), How.TURNS, ("conversations",)),
    ({"conversation": TURNS}, Columns(), How.TURNS, ("conversation",)),
    ({"body": "a"}, Columns(text_column="body"), How.TEXT, ("body",)),
    ({"talk": TURNS, "text": "x"}, Columns(text_column="talk"), How.TURNS, ("talk",)),
    ({"messages": "no turns at all"}, Columns(text_column="messages"), How.TEXT, ("messages",)),
    ({"messages": TURNS}, Columns(wanted=As.MIDTRAIN), How.CONTENTS, ("messages",)),
    ({"messages": TURNS}, Columns(wanted=As.PRETRAIN), How.RENDERED, ("messages",)),
    ({"messages": TURNS, "text": "x"}, Columns(wanted=As.CHAT), How.TURNS, ("messages",)),
    ({"messages": TURNS, "text": "x"}, Columns(as_written=True), How.WRITTEN, ("messages",)),
    ({"text": "x"}, Columns(wanted=As.MIDTRAIN), How.TEXT, ("text",)),
    ({"a": "x", "b": "y", "c": 1}, Columns(join_columns=("b", "a")), How.JOINED, ("b", "a")),
    (PAIR, Columns(), How.PAIRS, ("prompt", "chosen", "rejected")),
    ({"chosen": TURNS, "rejected": TURNS}, Columns(), How.PAIRS, ("chosen", "rejected")),
    (KTO, Columns(), How.JUDGED, ("completion", "prompt", "label")),
    ({"messages": TURNS, "label": 1}, Columns(), How.TURNS, ("messages",)),
    ({"messages": TURNS, "label": 1}, Columns(wanted=As.KTO), How.JUDGED, ("messages", "label")),
    ({"prompt": "q", "response": "a"}, Columns(wanted=As.CHAT), How.TURNS, ("response", "prompt")),
]


@pytest.mark.parametrize(("record", "choice", "how", "columns"), CASES)
def test_columns_are_told_by_what_they_hold(record: dict[str, Any], choice: Columns, how: How, columns: tuple[str, ...]) -> None:
    found = detect([record, record], choice)
    assert (found.how, found.names) == (how, columns)


def test_what_cannot_be_told_lists_the_columns() -> None:
    wrong: list[tuple[dict[str, Any], Columns]] = [
        ({"prompt": "q", "response": "a"}, Columns()),
        ({"messages": "text", "id": 3}, Columns()),
        ({"text": "x", "id": 3}, Columns(wanted=As.CHAT)),
        ({"chosen": "x"}, Columns(wanted=As.PAIRS)),
        ({"prompt": "q", "completion": "a"}, Columns(wanted=As.KTO)),
        ({"a": "x", "id": 2}, Columns(join_columns=("a", "b"))),
        ({"a": "x", "id": 2}, Columns(text_column="text")),
    ]
    for record, choice in wrong:
        with pytest.raises(DataError, match=f"the columns are {', '.join(record)}"):
            detect([record], choice)
    with pytest.raises(DataError, match="the column id holds int"):
        detect([{"id": 3}], Columns(text_column="id"))
    with pytest.raises(DataError, match="the columns are none"):
        detect([], Columns())
