# SPDX-License-Identifier: Apache-2.0
"""What a cleaning run counts: documents in and out of every stage, dropped and changed by rule, with examples. Knows no stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from megatron.data.cleaning.document import Document

EXAMPLES = 100
EXAMPLE_CHARACTERS = 200
READ_FOR_EXAMPLE = 2000
"""An example is masked before it is cut; more than this of a text is never looked at."""


class StageStats:
    """Counts of one task, or of a whole run.

    mask: hides personal data in the texts of examples; None where that is off
    """

    def __init__(self, mask: Callable[[str], str] | None = None) -> None:
        self.mask = mask
        self.stages: dict[str, dict[str, int]] = {}
        self.dropped: dict[str, dict[str, Any]] = {}
        self.changed: dict[str, dict[str, int]] = {}
        self.examples: dict[str, list[dict[str, Any]]] = {}

    def entered(self, stage: str, size: int) -> None:
        """A document of `size` characters reached a stage."""
        counts = self.stages.setdefault(stage, {"documents": 0, "characters": 0})
        counts["documents"] += 1
        counts["characters"] += size

    def drop(self, stage: str, rule: str, document: Document, note: str = "") -> None:
        """A rule refused a document. note: what it met, never personal data"""
        entry = self.dropped.setdefault(f"{stage}/{rule}", {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(self._example(document, note))

    def change(self, stage: str, what: str, by: int = 1) -> None:
        """A stage changed a document."""
        counts = self.changed.setdefault(stage, {})
        counts[what] = counts.get(what, 0) + by

    def show_change(self, stage: str, document: Document) -> None:
        """Keep a changed document as an example."""
        examples = self.examples.setdefault(stage, [])
        if len(examples) < EXAMPLES:
            examples.append(self._example(document, ""))

    def _example(self, document: Document, note: str) -> dict[str, Any]:
        text = document.text[:READ_FOR_EXAMPLE]
        if self.mask is not None:
            text = self.mask(text)
        found: dict[str, Any] = {"at": document.at, "text": text[:EXAMPLE_CHARACTERS]}
        name = document.record.get("id")
        if isinstance(name, str | int):
            found["id"] = name
        return found | ({"note": note} if note else {})

    def contents(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {"stages": self.stages, "dropped": self.dropped, "changed": self.changed, "examples": self.examples}

    def save(self, path: Path) -> None:
        """Write it for `merged`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(self.contents(), option=orjson.OPT_SORT_KEYS))


def merged(paths: Iterable[Path]) -> StageStats:
    """The sum of saved statistics; examples are the first ones, in the order of `paths`."""
    total = StageStats()
    for path in paths:
        part = orjson.loads(path.read_bytes())
        for stage, counts in part["stages"].items():
            _add(total.stages.setdefault(stage, {}), counts)
        for stage, counts in part["changed"].items():
            _add(total.changed.setdefault(stage, {}), counts)
        for rule, entry in part["dropped"].items():
            mine = total.dropped.setdefault(rule, {"count": 0, "examples": []})
            mine["count"] += entry["count"]
            mine["examples"] = (mine["examples"] + entry["examples"])[:EXAMPLES]
        for stage, examples in part["examples"].items():
            total.examples[stage] = (total.examples.get(stage, []) + examples)[:EXAMPLES]
    return total


def _add(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count
