# SPDX-License-Identifier: Apache-2.0
"""Stage `blocklist`: documents that hold a word, phrase or pattern of a list are dropped. Knows the list's file form and its hash."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from megatron.data.cleaning.document import Document
from megatron.data.cleaning.stage import Judge
from megatron.data.cleaning.stage_stats import StageStats
from megatron.errors import DataError

TOKEN = re.compile(r"\w+")
SIMPLE = re.compile(r"[\w\s'\u2019-]+")
PATTERN = "re:"
COMMENT = "#"


def _words(text: str) -> list[str]:
    return TOKEN.findall(unicodedata.normalize("NFC", text).casefold())


@dataclass
class Blocklist:
    """A list's entries. phrases: first word -> (all words, line of the list); patterns: (pattern, line); sha256: of the file's bytes"""

    sha256: str
    phrases: dict[str, list[tuple[list[str], int]]] = field(default_factory=dict)
    patterns: list[tuple[re.Pattern[str], int]] = field(default_factory=list)

    @property
    def entries(self) -> int:
        """How many words, phrases and patterns."""
        return len(self.patterns) + sum(len(found) for found in self.phrases.values())

    def first_match(self, text: str) -> int | None:
        """The line of the list of the first entry found, whole words only, case ignored."""
        tokens = _words(text)
        for place, token in enumerate(tokens):
            for phrase, line in self.phrases.get(token, ()):
                if tokens[place : place + len(phrase)] == phrase:
                    return line
        for pattern, line in self.patterns:
            if pattern.search(text):
                return line
        return None


def read_blocklist(path: Path) -> Blocklist:
    """One word or phrase a line; `re:` begins a regular expression, `#` a comment. Raises DataError naming the line."""
    try:
        raw = path.read_bytes()
        lines = raw.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the blocklist cannot be read: {error}", where=str(path), fix="a text file in UTF-8") from error
    found = Blocklist(hashlib.sha256(raw).hexdigest())
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith(COMMENT):
            continue
        if entry.startswith(PATTERN):
            try:
                found.patterns.append((re.compile(entry.removeprefix(PATTERN), re.IGNORECASE), number))
            except re.error as error:
                raise DataError(f"not a regular expression: {error}", where=f"{path}:{number}", fix="fix the line") from error
        elif SIMPLE.fullmatch(entry) and (words := _words(entry)):
            found.phrases.setdefault(words[0], []).append((words, number))
        else:
            # Marks within an entry count: `c++` must not block every c.
            found.patterns.append((re.compile(rf"(?<!\w){re.escape(entry)}(?!\w)", re.IGNORECASE), number))
    if not found.entries:
        raise DataError("the blocklist is empty", where=str(path), fix="one word, phrase or re:pattern a line")
    return found


@dataclass(frozen=True)
class BlockListed:
    """path: the list; sha256: what it must still be"""

    path: str
    sha256: str
    name: str = "blocklist"

    def open(self, stage_stats: StageStats) -> Judge:
        """Reads the list again, in the process that does the work."""
        entries = read_blocklist(Path(self.path))
        if entries.sha256 != self.sha256:
            raise DataError("the blocklist was changed during the run", where=self.path, fix="start again")

        def judge(document: Document) -> tuple[str, str] | None:
            line = entries.first_match(document.text)
            return None if line is None else ("entry", f"line {line}")

        return judge
