# SPDX-License-Identifier: Apache-2.0
"""From the first records to what they are: which columns, in which role. Decides by what the columns hold, not by their names alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron.data.hf.request import As, Columns
from megatron.errors import DataError

TURNS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response")
ROLES, CONTENTS = ("role", "from"), ("content", "value")


class How(str, Enum):
    """What becomes of a record."""

    TEXT = "the text of a column"
    JOINED = "the texts of several columns, a blank line between"
    CONTENTS = "the contents of the turns, a blank line between"
    WRITTEN = "the turns as Python writes them"
    RENDERED = "the turns as the chat template writes them, without labels"
    TURNS = "conversations with labels"
    PAIRS = "chosen and rejected answers with labels"
    JUDGED = "answers with labels and whether they are wanted"


@dataclass(frozen=True)
class Found:
    """columns: (role, column): text | messages, prompt, tools | chosen, rejected, prompt | messages, prompt, label"""

    how: How
    columns: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(dict.fromkeys(column for _, column in self.columns))


def detect(records: Sequence[Mapping[str, Any]], request: Columns) -> Found:
    """What these first records are. Raises DataError listing the columns when they are not what is wanted, or nothing known."""
    values: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            values.setdefault(name, []).append(value)
    table = _Table({name: [value for value in held if value is not None] for name, held in values.items()})
    if request.join_columns:
        return _joined(table, request.join_columns)
    if request.text_column is not None:
        return _one_column(table, request, request.text_column)
    if request.wanted is As.PAIRS:
        return _wanted(_pairs(table), table, "pairs need the columns chosen and rejected")
    if request.wanted is As.KTO:
        return _wanted(_judged(table, any_turns=True), table, "KTO needs completion (or turns), and label (true or false)")
    if request.wanted is As.CHAT:
        return _wanted(
            _turns(table, request) or _answers(table), table, f"there are no turns ({', '.join(TURNS)}, or prompt and completion)"
        )
    return _wanted(
        _text(table, request, some=True)
        or _plain_turns(table, request)
        or _turns(table, request)
        or _pairs(table)
        or _judged(table, any_turns=False)
        or _text(table, request, some=False),
        table,
        "no column is text or turns",
    )


class _Table:
    """The values of each column of the first records, without the absent ones."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = columns

    def is_text(self, name: str) -> bool:
        return name in self.columns and all(isinstance(value, str) for value in self.columns[name])

    def is_turns(self, name: str) -> bool:
        held = self.columns.get(name) or []
        return bool(held) and all(isinstance(value, list) and all(map(_is_turn, value)) for value in held) and any(held)

    def is_judgement(self, name: str) -> bool:
        held = self.columns.get(name) or []
        return bool(held) and all(isinstance(value, bool | int | float) for value in held)

    def some(self, *names: str) -> list[tuple[str, str]]:
        return [(name, name) for name in names if self.columns.get(name)]


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in ROLES)


def _wanted(found: Found | None, table: _Table, what: str) -> Found:
    if found is None:
        raise DataError(
            f"{what}; the columns are {', '.join(table.columns) or 'none'}",
            where="columns",
            fix="name one with --text-column, several with --join-columns, or say what they are with --as",
        )
    return found


def _missing(name: str, table: _Table, flag: str) -> DataError:
    return DataError(f"no column {name}; the columns are {', '.join(table.columns) or 'none'}", where=flag, fix="name another")


def _joined(table: _Table, names: Sequence[str]) -> Found:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise DataError(
            f"no column {', '.join(missing)}; the columns are {', '.join(table.columns) or 'none'}",
            where="--join-columns",
            fix="name others",
        )
    return Found(How.JOINED, tuple(("text", name) for name in names))


def _one_column(table: _Table, request: Columns, name: str) -> Found:
    if name not in table.columns:
        raise _missing(name, table, "--text-column")
    if table.is_text(name) and request.wanted in (None, As.PRETRAIN, As.MIDTRAIN) and not request.as_written:
        return Found(How.TEXT, (("text", name),))
    if not table.is_turns(name):
        held = type(next(iter(table.columns[name]), None)).__name__
        raise DataError(f"the column {name} holds {held}, not what is wanted of it", where="--text-column", fix="name another")
    if request.wanted is As.KTO:
        return Found(How.JUDGED, (("messages", name), *table.some("prompt", "tools", "label")))
    if plain := _plain_of(table, name, request):
        return plain
    return Found(How.TURNS, (("messages", name), *table.some("tools")))


def _text(table: _Table, request: Columns, *, some: bool) -> Found | None:
    # --skip-chat-template asks for turns; a column `text` wins otherwise, as users know it, unless nothing is in it.
    usable = table.is_text("text") and not request.as_written and (not some or bool(table.columns["text"]))
    return Found(How.TEXT, (("text", "text"),)) if usable else None


def _plain_of(table: _Table, name: str, request: Columns) -> Found | None:
    if request.as_written:
        return Found(How.WRITTEN, (("text", name),))
    if request.wanted is As.MIDTRAIN:
        return Found(How.CONTENTS, (("text", name),))
    return Found(How.RENDERED, (("messages", name), *table.some("tools"))) if request.wanted is As.PRETRAIN else None


def _plain_turns(table: _Table, request: Columns) -> Found | None:
    return next((plain for name in TURNS if table.is_turns(name) and (plain := _plain_of(table, name, request))), None)


def _turns(table: _Table, request: Columns) -> Found | None:
    if request.wanted not in (None, As.CHAT):
        return None
    name = next((name for name in TURNS if table.is_turns(name)), None)
    return Found(How.TURNS, (("messages", name), *table.some("tools"))) if name else None


def _answers(table: _Table) -> Found | None:
    name = next((name for name in ANSWERS if table.columns.get(name)), None)
    return Found(How.TURNS, (("messages", name), *table.some("prompt", "tools"))) if name and "prompt" in table.columns else None


def _pairs(table: _Table) -> Found | None:
    if not (table.columns.get("chosen") and table.columns.get("rejected")):
        return None
    return Found(How.PAIRS, tuple(table.some("prompt", "chosen", "rejected", "tools")))


def _judged(table: _Table, *, any_turns: bool) -> Found | None:
    if not table.is_judgement("label"):
        return None
    # A column called label is often a class: beside turns it is a judgement only where that is said.
    names = (*ANSWERS, *TURNS) if any_turns else ANSWERS[:1]
    name = next((name for name in names if table.columns.get(name)), None)
    if name is None or (not any_turns and not all(isinstance(value, bool) for value in table.columns["label"])):
        return None
    return Found(How.JUDGED, (("messages", name), *table.some("prompt", "tools", "label")))
