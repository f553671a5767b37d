# SPDX-License-Identifier: Apache-2.0
"""What a stage is: settings that can be sent to another process, and a judge of one document made of them there. Knows no stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron.data.cleaning.document import Document
from megatron.data.cleaning.stage_stats import StageStats

Judge = Callable[[Document], str | tuple[str, str] | None]
"""None keeps the document, whose text may have been changed. Otherwise the rule that refused it, or (rule, what it met)."""


class DocumentStage(Protocol):
    """A stage that looks at one document at a time."""

    @property
    def name(self) -> str:
        """As the report calls it."""

    def open(self, stage_stats: StageStats) -> Judge:
        """Load what is needed, in the process that does the work."""
