# SPDX-License-Identifier: Apache-2.0
"""From the keys of a record to conversations, pairs of them, and rewards.

A prompt may be text (one user turn) or turns; an answer text (one turn of the generation role), one turn, or turns. Turns that
begin with the prompt's, or follow a prompt given as text but do not begin with the generation role, are the whole conversation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.chat.template import Turn
from megatron.data.chat.turns import GENERATED_KEYS, Conversation, UnmaskableError


def talk_of(record: Mapping[str, Any], key: str, tools_key: str | None = None) -> Conversation:
    """The conversation under a key. Raises UnmaskableError where there is none."""
    return Conversation(_turns(_value(record, key), key), _tools(record, tools_key))


def answered(record: Mapping[str, Any], prompt_key: str, key: str, role: str, tools_key: str | None = None) -> tuple[Conversation, int]:
    """The prompt and the answer under a key as one conversation, and how many of its turns are the prompt.

    A record without the prompt holds the whole under `key`. Raises UnmaskableError."""
    answer, prompt = _value(record, key), record.get(prompt_key)
    if prompt is None and not isinstance(answer, list):
        raise UnmaskableError(f"no prompt under {prompt_key}, and {key} holds no turns")
    turns = _turns(
        [{"role": role, "content": answer}] if isinstance(answer, str) else [answer] if isinstance(answer, dict) else answer, key
    )
    before = [] if prompt is None else _turns([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, prompt_key)
    if before and list(turns[: len(before)]) == list(before):
        whole, first = turns, len(before)
    elif isinstance(prompt, str) and turns[0]["role"] != role:
        whole, first = turns, 0
    else:
        whole, first = [*before, *turns], len(before)
    return Conversation(whole, _tools(record, tools_key)), first


def fixed(talk: Conversation, fix: Callable[[str], str]) -> Conversation:
    """The conversation with its contents fixed."""
    turns = [{**turn, "content": fix(turn["content"])} if isinstance(turn.get("content"), str) else turn for turn in talk.turns]
    return Conversation(turns, talk.tools)


def common_turns(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """How many turns two conversations begin with alike.

    >>> common_turns([{"role": "user"}, {"role": "a"}], [{"role": "user"}, {"role": "b"}])
    1
    """
    return next((number for number, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), min(len(one), len(other)))


def reward_of(value: Any, key: str, *, binary: bool) -> NDArray[Any]:
    """[1] float32, or with `binary` int32: 1 for true and numbers above 0, else -1. Raises UnmaskableError for what is no number."""
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise UnmaskableError(f"{key}: not a number but {value!r:.40}")
    return np.array([1 if value > 0 else -1], dtype="<i4") if binary else np.array([value], dtype="<f4")


def _value(record: Mapping[str, Any], key: str) -> Any:
    if key not in record:
        raise UnmaskableError(f"no key {key}; the record has {', '.join(sorted(map(str, record))) or 'none'}")
    return record[key]


def _turns(value: Any, key: str) -> Sequence[Turn]:
    if not isinstance(value, list) or not value:
        raise UnmaskableError(f"{key}: not a list of turns but {'an empty one' if value == [] else type(value).__name__}")
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            hint = " (rename from/value to role/content)" if isinstance(turn, Mapping) and "from" in turn else ""
            raise UnmaskableError(f"{key}: turn {number} is not {{role, content}}{hint}")
        if "content" not in turn and not any(turn.get(name) for name in GENERATED_KEYS):
            raise UnmaskableError(f"{key}: turn {number} ({turn['role']}) has no content")
    # Tables give every turn every key; templates ask whether a key is there.
    return [{name: held for name, held in turn.items() if held is not None or name == "content"} for turn in value]


def _tools(record: Mapping[str, Any], key: str | None) -> Sequence[Any] | None:
    tools = record.get(key) if key else None
    if tools is not None and not isinstance(tools, list):
        raise UnmaskableError(f"{key}: not a list of tools but {type(tools).__name__}")
    return tools or None
