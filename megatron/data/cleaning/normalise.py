# SPDX-License-Identifier: Apache-2.0
"""Stage `normalise`: composed Unicode, no control characters, one kind of line end; ftfy on request. Knows only texts."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from megatron.data.cleaning.document import Document
from megatron.data.cleaning.stage import Judge
from megatron.data.cleaning.stage_stats import StageStats

LINE_ENDS = re.compile(r"\r\n?|\u2028|\u2029|\x85")
# Controls but tab and newline, byte order marks, and Unicode's non-characters.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")


def normalised(text: str) -> str:
    r"""The text in NFC, without control characters, lines ended by \n.

    >>> normalised("e\u0301\x00a\r\nb")
    '\xe9a\nb'
    """
    return unicodedata.normalize("NFC", CONTROLS.sub("", LINE_ENDS.sub("\n", text)))


@dataclass(frozen=True)
class Normalise:
    """ftfy: fix text that was decoded wrongly, too"""

    ftfy: bool = False
    name: str = "normalise"

    def open(self, stage_stats: StageStats) -> Judge:
        """Drops what is empty afterwards."""
        fix = None
        if self.ftfy:
            import ftfy

            fix = ftfy.fix_text

        def judge(document: Document) -> str | None:
            text = normalised(fix(document.text) if fix is not None else document.text)
            if text != document.text:
                stage_stats.change(self.name, "documents")
                document.text = text
            return None if text.strip() else "empty"

        return judge
