# SPDX-License-Identifier: Apache-2.0
"""Stage `language`: documents of other languages are dropped, by fastText's model or by function words. Knows a few languages' words.

The word lists tell seven languages of Latin script apart in running text of MIN_WORDS words or more, and rarely take one for another. Part
of what is in them stays unknown (terse text more than prose), and a close relative of one of the seven may pass for it:
documentation/cleaning.md gives figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.data.cleaning.backend import datatrove
from megatron.data.cleaning.document import Document
from megatron.data.cleaning.stage import Judge
from megatron.data.cleaning.stage_stats import StageStats
from megatron.data.cleaning.words import plain_words

MIN_WORDS = 20
MIN_SHARE = 0.2
MIN_LEAD = 1.3
UNKNOWN = "unknown"
READ_WORDS = 2000
FUNCTION_WORDS: dict[str, tuple[str, ...]] = {
    code: tuple(words.split())
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


def guess(text: str) -> tuple[str, float]:
    """(language, share of words that are its function words); `unknown` where no language leads clearly.

    >>> guess("short")
    ('unknown', 0.0)
    """
    words = plain_words(text[: READ_WORDS * 20])[:READ_WORDS]
    if len(words) < MIN_WORDS:
        return UNKNOWN, 0.0
    shares = sorted(((sum(word in known for word in words) / len(words), code) for code, known in _SETS.items()), reverse=True)
    (best, code), (second, _) = shares[:2]
    return (code, best) if best >= MIN_SHARE and best >= MIN_LEAD * second else (UNKNOWN, best)


_SETS = {code: frozenset(words) for code, words in FUNCTION_WORDS.items()}


@dataclass(frozen=True)
class ByFunctionWords:
    """languages: codes to keep"""

    languages: tuple[str, ...]
    name: str = "language"

    def open(self, stage_stats: StageStats) -> Judge:
        """Drops other and unknown languages."""

        def judge(document: Document) -> str | None:
            code, _ = guess(document.text)
            stage_stats.change(self.name, f"found {code}")
            return None if code in self.languages else code

        return judge


@dataclass(frozen=True)
class ByFastText:
    """languages: codes to keep; threshold: least probability"""

    languages: tuple[str, ...]
    threshold: float
    name: str = "language"

    def open(self, stage_stats: StageStats) -> Judge:
        """datatrove's filter; its model is downloaded once."""
        kept = datatrove().language_filter(list(self.languages), self.threshold)

        def judge(document: Document) -> str | None:
            code, right = kept(document.text)
            stage_stats.change(self.name, f"found {code}")
            return None if right else code

        return judge
