# SPDX-License-Identifier: Apache-2.0
"""From the keys of a record to conversations."""

from __future__ import annotations

import doctest

from megatron.data.chat import records
from megatron.data.chat import turns as room
from megatron.data.chat.records import answered, common_turns, fixed, talk_of
from tests.support.chat import turns


def test_keys_without_a_value_are_not_there_but_for_the_content() -> None:
    """Rows of a table have every key; a template that asks whether a key is there must get the answer of a JSON line."""
    rows = [{"role": "user", "content": "x", "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert talk_of({"talk": rows, "tools": None}, "talk", "tools") == ([{"role": "user", "content": "x"}, rows[1]], None)


def test_what_is_the_prompt() -> None:
    whole = turns("a", "b", "c", "d")
    for record, first in [
        ({"prompt": whole[:3], "answer": whole}, 3),
        ({"prompt": whole[:3], "answer": whole[3:]}, 3),
        ({"prompt": whole[:3], "answer": "d"}, 3),
        ({"answer": whole}, 0),
        ({"prompt": "a", "answer": whole}, 1),
        ({"prompt": "something else", "answer": whole}, 0),
    ]:
        talk, count = answered(record, "prompt", "answer", "assistant")
        assert (talk.turns, count) == (whole, first)


def test_contents_are_fixed() -> None:
    talk = talk_of({"talk": [*turns("a"), {"role": "assistant", "content": [{"text": "b"}]}]}, "talk")
    assert [turn["content"] for turn in fixed(talk, str.upper).turns] == ["A", [{"text": "b"}]]


def test_common_turns() -> None:
    assert common_turns(turns("a", "b"), turns("a", "c", "d")) == 1 and common_turns(turns("a"), turns("a", "b")) == 1


def test_examples_in_docstrings() -> None:
    for module in (records, room):
        found = doctest.testmod(module)
        assert found.failed == 0 and found.attempted > 0, module.__name__
