# SPDX-License-Identifier: Apache-2.0
"""A document on its way through the cleaning stages, what a stage is, and the counts that a run keeps of both."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import orjson

EXAMPLES = 100
EXAMPLE_CHARACTERS = 200
READ_FOR_EXAMPLE = 2000
"""An example is masked before it is cut; more than this of a text is never looked at."""


@dataclass
class Document:
    """One record of the input.

    text:   what the stages read and may change
    at:     file:line of the record (file:row in Parquet)
    record: all other fields, kept as they were
    """

    text: str
    at: str
    record: dict[str, Any] = field(default_factory=dict)

    def pack(self) -> bytes:
        """One line, for the next stage."""
        return orjson.dumps([self.text, self.at, self.record], option=orjson.OPT_APPEND_NEWLINE)

    @staticmethod
    def unpack(line: bytes) -> Document:
        """The document of a line of `pack`."""
        return Document(*orjson.loads(line))


def look_up(record: Mapping[str, Any], key: str) -> Any:
    """The value under a key, or under a path of keys with dots; None where there is none.

    >>> look_up({"meta": {"lang": "py"}}, "meta.lang")
    'py'
    """
    if key in record:
        return record[key]
    found: Any = record
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def new_file(folder: Path, name: str) -> Path:
    """A file to write in a folder, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


class StageStats:
    """Counts of one task, or of a whole run: documents in and out of every stage, dropped and changed by rule, with examples.

    mask: hides personal data in the texts of examples; None where that is off
    """

    def __init__(self, mask: Callable[[str], str] | None = None) -> None:
        self.mask = mask
        self.stages: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.changed: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.dropped: defaultdict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "examples": []})
        self.examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    def entered(self, stage: str, size: int) -> None:
        """A document of `size` characters reached a stage."""
        counts = self.stages[stage]
        counts["documents"] += 1
        counts["characters"] += size

    def drop(self, stage: str, rule: str, document: Document, note: str = "") -> None:
        """A rule refused a document. note: what it met, never personal data"""
        entry = self.dropped[f"{stage}/{rule}"]
        entry["count"] += 1
        self._show(entry["examples"], document, {"note": note} if note else {})

    def change(self, stage: str, what: str, by: int = 1) -> None:
        """A stage changed a document."""
        self.changed[stage][what] += by

    def show_change(self, stage: str, document: Document) -> None:
        """Keep a changed document as an example."""
        self._show(self.examples[stage], document, {})

    def _show(self, examples: list[dict[str, Any]], document: Document, note: dict[str, str]) -> None:
        if len(examples) >= EXAMPLES:
            return
        text = document.text[:READ_FOR_EXAMPLE]
        if self.mask is not None:
            text = self.mask(text)
        name = document.record.get("id")
        known = {"id": name} if isinstance(name, str | int) else {}
        examples.append({"at": document.at, "text": text[:EXAMPLE_CHARACTERS], **known, **note})

    def save(self, path: Path) -> None:
        """Write it for `merged`."""
        contents = {"stages": self.stages, "dropped": self.dropped, "changed": self.changed, "examples": self.examples}
        path.write_bytes(orjson.dumps(contents, option=orjson.OPT_SORT_KEYS))


def merged(paths: Iterable[Path]) -> StageStats:
    """The sum of saved statistics; examples are the first ones, in the order of `paths`."""
    total = StageStats()
    for path in paths:
        part = orjson.loads(path.read_bytes())
        for kind, sums in (("stages", total.stages), ("changed", total.changed)):
            for stage, counts in part[kind].items():
                sums[stage].update(counts)
        for rule, entry in part["dropped"].items():
            total.dropped[rule]["count"] += entry["count"]
            total.dropped[rule]["examples"] = (total.dropped[rule]["examples"] + entry["examples"])[:EXAMPLES]
        for stage, examples in part["examples"].items():
            total.examples[stage] = (total.examples[stage] + examples)[:EXAMPLES]
    return total


Step = Callable[[Any, int, int], Any]
"""A step of an executor's pipeline: (what the step before gave, number of the task, number of tasks) -> what the next one gets."""

Judge = Callable[[Document], str | tuple[str, str] | None]
"""None keeps the document, whose text may have been changed. Otherwise the rule that refused it, or (rule, what it met)."""


class DocumentStage(Protocol):
    """A stage that looks at one document at a time: settings that can be sent to another process."""

    @property
    def name(self) -> str:
        """As the report calls it."""

    def open(self, stage_stats: StageStats) -> Judge:
        """Load what is needed, in the process that does the work."""
