# SPDX-License-Identifier: Apache-2.0
"""Stage `pii`: personal data and secrets replaced by typed placeholders. Counts them, and never passes one on to a log or report.

Patterns with a checksum (IBAN, card) are exact; e-mail, IP and key patterns are close; telephone numbers are a guess that asks for an
international or a bracketed form, since bare digits are more often something else.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.data.cleaning.document import Document, Judge, StageStats, look_up

PEM = r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]{1,10000}?-----END [A-Z ]*PRIVATE KEY-----"
KEYS = "|".join(
    (
        r"(?:AKIA|ASIA)[A-Z0-9]{16}",  # AWS
        r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{50,255}",
        r"glpat-[A-Za-z0-9_-]{20,}",
        r"hf_[A-Za-z0-9]{30,}",
        r"sk-(?:proj-|ant-|or-)?[A-Za-z0-9_-]{20,}",
        r"(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
        r"AIza[A-Za-z0-9_-]{35}",  # Google
        r"xox[abposr]-[A-Za-z0-9-]{10,}",  # Slack
        r"npm_[A-Za-z0-9]{36}",
        r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",  # JSON web token
    )
)
IBAN = r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"
IPV6 = r"(?:[0-9A-Fa-f]{0,4}:){2,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4})"
ABROAD = r"[1-9]\d{0,2}[ .\-/]?(?:\(\d{1,4}\)[ .\-/]?)?\d{1,4}(?:[ .\-/]?\d{2,4}){1,4}"
PHONE = "|".join(
    (
        rf"(?<=\+){ABROAD}",  # +44 20 ...
        rf"(?<=0)0{ABROAD}",  # 0049 30 ...
        r"(?<=\()\d{3}\) ?\d{3}[-. ]\d{4}",  # (415) 555-...
        r"(?<=\d)\d\d-\d{3}-\d{4}",  # 415-555-...
    )
)
IBAN_LENGTH = range(15, 35)
CARD_LENGTH = range(13, 20)
PHONE_LENGTH = range(8, 16)


def _iban(match: str) -> bool:
    """ISO 13616: the rearranged number is 1 modulo 97."""
    plain = match.replace(" ", "")
    return len(plain) in IBAN_LENGTH and int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


def _card(match: str) -> bool:
    """The checksum of ISO 7812 (Luhn)."""
    digits = [int(sign) for sign in match if sign.isdigit()]
    doubled = [digit if index % 2 == 0 else sum(divmod(2 * digit, 10)) for index, digit in enumerate(reversed(digits))]
    return len(digits) in CARD_LENGTH and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _address(match: str) -> bool:
    """Of a public host: loopback, private and documentation ranges say nothing about a person."""
    try:
        address = ipaddress.ip_address(match)
    except ValueError:
        return False
    # Of IPv6 only 2000::/3 is given out: a::b is an address, too, and C++.
    return address.is_global and (address.version == 4 or int(address) >> 125 == 1)


def _phone(match: str) -> bool:
    return sum(sign.isdigit() for sign in match) in PHONE_LENGTH


KEY_SIGNS = ("AKIA", "ASIA", "gh", "glpat-", "hf_", "sk-", "k_", "AIza", "xox", "npm_", "eyJ", "PRIVATE KEY")
RULES: tuple[tuple[str, tuple[str, ...], re.Pattern[str], Callable[[str], bool] | None], ...] = (
    # (name, one of which must be in the text, pattern, check of a match), in the order they are tried at a place.
    # What may not stand before a number is asked for after its first digit: so the search goes from digit to digit, four times as fast.
    ("key", KEY_SIGNS, re.compile(rf"{PEM}|(?<![A-Za-z0-9_-])(?:{KEYS})(?![A-Za-z0-9])"), None),
    ("email", ("@",), re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-])"), None),
    ("iban", (), re.compile(rf"(?<![A-Za-z0-9]){IBAN}(?![A-Za-z0-9])"), _iban),
    ("card", (), re.compile(r"\d(?<![\d.].)(?:[ -]?\d){12,18}(?![\d.]?\d)"), _card),
    ("ip", (".",), re.compile(r"\d(?<![\d.].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?!\.?\d)"), _address),
    ("ip", (":",), re.compile(rf"(?<![0-9A-Za-z:.]){IPV6}(?![0-9A-Za-z:])"), _address),
    ("phone", (), re.compile(rf"[+(\d](?<![\w+.].)(?<!\d .)(?:{PHONE})(?!\w)"), _phone),
)


def mask_text(text: str, counts: Counter[str] | None = None) -> str:
    """The text with placeholders; `counts` grows by what was found.

    >>> mask_text("write to jo@mail.org or +44 20 7946 0958, not 192.168.0.1")
    'write to <EMAIL> or <PHONE>, not 192.168.0.1'
    """
    for name, signs, pattern, check in RULES:
        if signs and not any(sign in text for sign in signs):
            continue

        def place(found: re.Match[str], name: str = name, check: Callable[[str], bool] | None = check) -> str:
            if check is not None and not check(found.group()):
                return found.group()
            if counts is not None:
                counts[name] += 1
            return f"<{name.upper()}>"

        text = pattern.sub(place, text)
    return text


@dataclass(frozen=True)
class Code:
    """Which documents are code. all: every one; where: (key, value) pairs, one of which a code document's record has"""

    all: bool = False
    where: tuple[tuple[str, str], ...] = ()

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether a record is code."""
        return self.all or any(str(look_up(record, key)) == value for key, value in self.where)


@dataclass(frozen=True)
class MaskPII:
    """code: documents left alone, in which most matches are test data and literals; None masks those, too"""

    code: Code | None = None
    name: str = "pii"

    def open(self, stage_stats: StageStats) -> Judge:
        """Keeps every document."""

        def judge(document: Document) -> None:
            if self.code is not None and self.code.holds(document.record):
                stage_stats.change(self.name, "left alone: code")
                return
            counts: Counter[str] = Counter()
            document.text = mask_text(document.text, counts)
            for name, count in counts.items():
                stage_stats.change(self.name, name, count)
            if counts:
                stage_stats.change(self.name, "documents")
                stage_stats.show_change(self.name, document)

        return judge
