# SPDX-License-Identifier: Apache-2.0
"""Stages that look at one document by itself: normalise, language, quality, blocklist.

normalise: composed Unicode, no control characters, one kind of line end; ftfy on request.
language:  documents of other languages are dropped, by fastText's model or by function words. The word lists tell seven languages of
           Latin script apart in running text of MIN_WORDS words or more, and rarely take one for another. Part of what is in them stays
           unknown (terse text more than prose), and a close relative of one of the seven may pass for it: documentation/cleaning.md
           gives figures.
quality:   the heuristics of Gopher, C4 and FineWeb, as datatrove computes them.
blocklist: documents that hold a word, phrase or pattern of a list are dropped.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.data.cleaning.document import Document, Judge, StageStats
from megatron.data.cleaning.words import plain_words
from megatron.errors import BackendError, DataError


def datatrove() -> Any:
    """The module that wraps datatrove. Raises BackendError naming the extra."""
    if find_spec("datatrove") is None:
        raise BackendError("cleaning runs on the package datatrove, which is not installed", fix="uv pip install 'megatron-neox[clean]'")
    from megatron.data.cleaning import datatrove_adapter

    return datatrove_adapter


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


MIN_WORDS = 20
MIN_SHARE = 0.2
MIN_LEAD = 1.3
UNKNOWN = "unknown"
READ_WORDS = 2000
FUNCTION_WORDS: dict[str, frozenset[str]] = {
    code: frozenset(words.split())
    for code, words in {
        "en": "the be to of and that have with is in it for was on are as you this his from they at or by not but what "
        "all were when we there can an your which their said if will each how about out them then she many some "
        "would into has more her who",
        "de": "der die das und ist nicht ein eine zu den mit von auf sich dem des im f\xfcr es auch als an werden aus er "
        "hat dass sie nach bei wird einer um am sind noch wie einem \xfcber einen so zum war haben nur oder aber vor "
        "zur bis mehr durch man wenn ich wir",
        "fr": "le la les de des et est un une du dans que qui en pour pas sur plus par au ce il avec ne se sont aux ou "
        "mais elle son cette nous vous ont comme \xeatre fait sans leur \xe9t\xe9 ses tout m\xeame deux ces je lui peut o\xf9 si "
        "bien tr\xe8s entre aussi",
        "es": "el la los las de que en un una es por con no para se del al lo como m\xe1s pero sus su le ya este s\xed porque "
        "esta entre cuando muy sin sobre tambi\xe9n me hasta hay donde quien desde todo nos durante uno les ni contra "
        "ese eso ante ellos fue son",
        "it": "il la le di che un una \xe8 in per non del della con si da al dei nel sono gli lo pi\xf9 anche come alla delle "
        "ma ha dal se nella questo essere dalla sul suo sua stato hanno degli loro tra cui due fra ai sulla dopo "
        "quando era molto anni ed",
        "pt": "os as de que do da em um uma para com n\xe3o no na por mais dos das se ao como mas foi ele ela seu sua ou "
        "ser quando muito nos j\xe1 est\xe1 eu tamb\xe9m s\xf3 pelo pela at\xe9 isso entre era depois sem mesmo aos ter seus quem "
        "nas me esse eles s\xe3o",
        "nl": "de het een van en in is dat op te zijn met voor niet aan er om die ook als bij door maar naar uit dan nog "
        "worden wordt over tot heeft hij ze was of deze meer kan geen werd hebben zich had ik haar al wat zo moet "
        "wel hun onder tegen na je",
    }.items()
}


def guess_language(text: str) -> str:
    """The language whose function words the text is full of; `unknown` where no language leads clearly.

    >>> guess_language("short")
    'unknown'
    """
    words = plain_words(text[: READ_WORDS * 20])[:READ_WORDS]
    if len(words) < MIN_WORDS:
        return UNKNOWN
    shares = sorted(((sum(word in known for word in words) / len(words), code) for code, known in FUNCTION_WORDS.items()), reverse=True)
    (best, code), (second, _) = shares[:2]
    return code if best >= MIN_SHARE and best >= MIN_LEAD * second else UNKNOWN


@dataclass(frozen=True)
class Language:
    """languages: codes to keep; threshold: least probability that fastText gives one of them, None: by function words"""

    languages: tuple[str, ...]
    threshold: float | None = None
    name: str = "language"

    def open(self, stage_stats: StageStats) -> Judge:
        """Drops other and unknown languages. fastText's model is downloaded once."""
        find: Callable[[str], tuple[str, bool]] = self._by_function_words
        if self.threshold is not None:
            find = datatrove().language_filter(list(self.languages), self.threshold)

        def judge(document: Document) -> str | None:
            code, wanted = find(document.text)
            stage_stats.change(self.name, f"found {code}")
            return None if wanted else code

        return judge

    def _by_function_words(self, text: str) -> tuple[str, bool]:
        code = guess_language(text)
        return code, code in self.languages


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
