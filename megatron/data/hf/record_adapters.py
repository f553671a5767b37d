# SPDX-License-Identifier: Apache-2.0
"""From a record as it was found to the record that an encoder reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megatron.data.chat.records import talk_of
from megatron.data.chat.sources import ChatFormat
from megatron.data.chat.template import ChatTemplate
from megatron.data.chat.turns import UnmaskableError, rendered
from megatron.data.hf.detect import Found, How
from megatron.data.preprocess.blocks import keys_of
from megatron.data.preprocess.encoders import Dropped, Fault

BLANK_LINE = "\n\n"
EMPTY = Dropped("empty")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names of `from` in turns {from, value}, and the roles that templates know."""

Shaped = dict[str, Any] | Dropped | Fault


@dataclass(frozen=True)
class RecordAdapter:
    """What is found of a record, and the template where turns are rendered. Records come out as
    {"text"}, or {"messages", "prompt", "label", "tools"}, or {"prompt", "chosen", "rejected", "tools"}, as far as they are there."""

    found: Found
    form: ChatFormat | None = None

    def open(self) -> Callable[[Mapping[str, Any]], Shaped]:
        """The function from record to record; it raises nothing."""
        columns = self.found.columns
        if self.form is not None and self.found.how is How.RENDERED:
            template = self.form.open_template()
            return lambda record: _rendered(record, columns, template)
        make = {How.TEXT: _text, How.JOINED: _joined, How.CONTENTS: _contents, How.WRITTEN: _written}.get(self.found.how, _roles)
        return lambda record: make(record, columns)


Roles = Sequence[tuple[str, str]]


def _text(record: Mapping[str, Any], columns: Roles) -> Shaped:
    name = columns[0][1]
    value = record.get(name)
    if value is None and name in record:
        return EMPTY
    return {"text": value} if isinstance(value, str) else Fault(f"no text under {name!r} (found: {keys_of(record)})")


def _joined(record: Mapping[str, Any], columns: Roles) -> Shaped:
    missing = [name for _, name in columns if name not in record]
    if missing:
        return Fault(f"no {', '.join(missing)} (found: {keys_of(record)})")
    text = join(record[name] for _, name in columns)
    return {"text": text} if text else EMPTY


def _contents(record: Mapping[str, Any], columns: Roles) -> Shaped:
    turns = record.get(columns[0][1])
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return Fault(f"no turns under {columns[0][1]!r} (found: {keys_of(record)})")
    text = join(turn.get("content", turn.get("value")) for turn in turns)
    return {"text": text} if text else EMPTY


def _written(record: Mapping[str, Any], columns: Roles) -> Shaped:
    name = columns[0][1]
    return {"text": str(record[name])} if record.get(name) is not None else Fault(f"nothing under {name!r} (found: {keys_of(record)})")


def _roles(record: Mapping[str, Any], columns: Roles) -> Shaped:
    shaped: dict[str, Any] = {}
    for role, name in columns:
        value = record.get(name)
        if value is None:
            continue
        try:
            shaped[role] = _tools(value) if role == "tools" else value if role == "label" else _with_roles(value)
        except ValueError as error:
            return Fault(f"{name}: {error}")
    return shaped


def _rendered(record: Mapping[str, Any], columns: Roles, template: ChatTemplate) -> Shaped:
    shaped = _roles(record, columns)
    if not isinstance(shaped, dict):
        return shaped
    try:
        return {"text": rendered(template, talk_of(shaped, "messages", "tools")).text}
    except UnmaskableError as error:
        return Fault(str(error))


def join(parts: Any) -> str:
    """Parts that are not empty, a blank line between them; what is no text is written as JSON.

    >>> join(["a", None, "", {"b": 1}])
    'a\\n\\n{"b": 1}'
    """
    return BLANK_LINE.join(
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False, default=str) for part in parts if not _empty(part)
    )


def _empty(part: Any) -> bool:
    return part is None or (isinstance(part, (str, list, dict)) and not part)


def _tools(value: Any) -> Any:
    # Tables hold the tools of a conversation as JSON text, because they differ from row to row.
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value) if value.strip() else None
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _with_roles(value: Any) -> Any:
    """Turns {from, value} as {role, content}; everything else as it is."""
    if not isinstance(value, list) or not any(isinstance(turn, Mapping) and "from" in turn and "role" not in turn for turn in value):
        return value
    turns = []
    for number, turn in enumerate(value):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in SPEAKERS:
            raise ValueError(f"turn {number} is from {speaker!r}, which is none of {', '.join(SPEAKERS)}")
        rest = {key: held for key, held in turn.items() if key not in ("from", "value")}
        turns.append({"role": SPEAKERS[speaker], "content": turn.get("value"), **rest})
    return turns
