# SPDX-License-Identifier: Apache-2.0
"""Stage `quality`: the heuristics of Gopher, C4 and FineWeb. Knows the stage's shape; the rules are datatrove's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron.data.cleaning.backend import datatrove
from megatron.data.cleaning.document import Document
from megatron.data.cleaning.stage import Judge
from megatron.data.cleaning.stage_stats import StageStats


class Filter(Enum):
    """A published set of rules."""

    GOPHER = "gopher"
    """Rae et al., arXiv 2112.11446, table A1 and section A1.1: length, symbols, stop words, repetition."""
    C4 = "c4"
    """Raffel et al., JMLR 21 (2020), section 2.2: lines that end a sentence; also changes the text, to the lines it keeps."""
    FINEWEB = "fineweb"
    """Penedo et al., arXiv 2406.17557: line ends, short lines, repeated lines, list-like pages."""


@dataclass(frozen=True)
class Quality:
    """filters: in any order, they apply in that of FineWeb; stop_words: of the corpus' language, None: Gopher's English ones

    An empty `stop_words` leaves that rule out.
    """

    filters: tuple[Filter, ...]
    stop_words: tuple[str, ...] | None = None
    name: str = "quality"

    def open(self, stage_stats: StageStats) -> Judge:
        """The rules' names come from datatrove."""
        rules = datatrove().quality_filters([one.value for one in Filter if one in self.filters], self.stop_words)

        def judge(document: Document) -> str | None:
            before = document.text
            for name, rule in rules:
                verdict = rule.filter(document)
                kept, reason = verdict if isinstance(verdict, tuple) else (verdict, None)
                if not kept:
                    # C4 cuts lines as it goes; an example shows the text as it came.
                    document.text = before
                    return f"{name}: {reason}" if reason else name
            if document.text != before:
                stage_stats.change(self.name, "documents with lines cut by c4")
            return None

        return judge
