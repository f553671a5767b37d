# SPDX-License-Identifier: Apache-2.0
"""From the first records to what they are: which columns, in which role. What the columns hold decides, not their names alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron.data.hf.request import As, Columns
from megatron.errors import DataError

TURNS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response")
ROLES = ("role", "from")


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
    table = _Table(records, request)
    if request.join_columns:
        return table.joined()
    if request.text_column is not None:
        return table.one_column(request.text_column)
    if request.wanted is As.PAIRS:
        found, what = table.pairs(), "pairs need the columns chosen and rejected"
    elif request.wanted is As.KTO:
        found, what = table.judged(any_turns=True), "KTO needs completion (or turns), and label (true or false)"
    elif request.wanted is As.CHAT:
        found, what = table.turns() or table.answers(), f"there are no turns ({', '.join(TURNS)}, or prompt and completion)"
    else:
        found = table.text(some=True) or table.turns() or table.pairs() or table.judged(any_turns=False) or table.text(some=False)
        what = "no column is text or turns"
    if found is None:
        raise table.error(what, "columns", "name one with --text-column, several with --join-columns, or say what they are with --as")
    return found


class _Table:
    """The values of each column of the first records, without the absent ones, and the forms they may be of."""

    def __init__(self, records: Sequence[Mapping[str, Any]], request: Columns) -> None:
        self.request = request
        self.columns: dict[str, list[Any]] = {name: [] for record in records for name in record}
        for record in records:
            for name, value in record.items():
                if value is not None:
                    self.columns[name].append(value)

    def error(self, what: str, where: str, fix: str) -> DataError:
        return DataError(f"{what}; the columns are {', '.join(self.columns) or 'none'}", where=where, fix=fix)

    def is_text(self, name: str) -> bool:
        return name in self.columns and all(isinstance(value, str) for value in self.columns[name])

    def is_turns(self, name: str) -> bool:
        held = self.columns.get(name) or []
        return any(held) and all(isinstance(value, list) and all(map(_is_turn, value)) for value in held)

    def some(self, *names: str) -> list[tuple[str, str]]:
        return [(name, name) for name in names if self.columns.get(name)]

    def joined(self) -> Found:
        names = self.request.join_columns
        if missing := [name for name in names if name not in self.columns]:
            raise self.error(f"no column {', '.join(missing)}", "--join-columns", "name others")
        return Found(How.JOINED, tuple(("text", name) for name in names))

    def one_column(self, name: str) -> Found:
        if name not in self.columns:
            raise self.error(f"no column {name}", "--text-column", "name another")
        if self.is_text(name) and self.request.wanted in (None, As.PRETRAIN, As.MIDTRAIN) and not self.request.as_written:
            return Found(How.TEXT, (("text", name),))
        if not self.is_turns(name):
            held = type(next(iter(self.columns[name]), None)).__name__
            raise DataError(f"the column {name} holds {held}, not what is wanted of it", where="--text-column", fix="name another")
        if self.request.wanted is As.KTO:
            return Found(How.JUDGED, (("messages", name), *self.some("prompt", "tools", "label")))
        return self.of_turns(name)

    def text(self, *, some: bool) -> Found | None:
        # --skip-chat-template asks for turns; a column `text` wins otherwise, as users know it, unless nothing is in it.
        usable = self.is_text("text") and not self.request.as_written and (not some or bool(self.columns["text"]))
        return Found(How.TEXT, (("text", "text"),)) if usable else None

    def turns(self) -> Found | None:
        return next((self.of_turns(name) for name in TURNS if self.is_turns(name)), None)

    def of_turns(self, name: str) -> Found:
        if self.request.as_written:
            return Found(How.WRITTEN, (("text", name),))
        if self.request.wanted is As.MIDTRAIN:
            return Found(How.CONTENTS, (("text", name),))
        how = How.RENDERED if self.request.wanted is As.PRETRAIN else How.TURNS
        return Found(how, (("messages", name), *self.some("tools")))

    def answers(self) -> Found | None:
        name = next((name for name in ANSWERS if self.columns.get(name)), None)
        return Found(How.TURNS, (("messages", name), *self.some("prompt", "tools"))) if name and "prompt" in self.columns else None

    def pairs(self) -> Found | None:
        given = len(self.some("chosen", "rejected")) == 2
        return Found(How.PAIRS, tuple(self.some("prompt", "chosen", "rejected", "tools"))) if given else None

    def judged(self, *, any_turns: bool) -> Found | None:
        # A column called label is often a class: beside turns it is a judgement only where that is said.
        names, kinds = ((*ANSWERS, *TURNS), bool | int | float) if any_turns else (ANSWERS[:1], bool)
        name = next((name for name in names if self.columns.get(name)), None)
        labels = self.columns.get("label")
        if name is None or not labels or not all(isinstance(label, kinds) for label in labels):
            return None
        return Found(How.JUDGED, (("messages", name), *self.some("prompt", "tools", "label")))


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in ROLES)
