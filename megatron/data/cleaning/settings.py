# SPDX-License-Identifier: Apache-2.0
"""What a cleaning run is asked to do. Knows no stage's code; `plan` makes stages of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from megatron.data.cleaning.minhash_dedup import Keep
from megatron.data.cleaning.pii import Code
from megatron.data.cleaning.quality import Filter
from megatron.errors import ConfigError

MOST_TASKS = 900
"""A band's files of all tasks are open at once, and 1024 is the usual limit."""
MOST_HASHES = 4096


class Form(Enum):
    """What the cleaned documents are written as."""

    JSONL = "jsonl"
    JSONL_GZ = "jsonl.gz"
    PARQUET = "parquet"


class Identify(Enum):
    """How the language of a document is found."""

    FASTTEXT = "fasttext"
    STOPWORDS = "stopwords"


@dataclass(frozen=True, kw_only=True)
class NearSettings:
    """MinHash. The midpoint of the curve lies near (1 / bands) ** (1 / rows) = 0.72; jaccard: pairs are checked to be as alike, too"""

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    keep: Keep = Keep.LONGEST
    jaccard: float | None = None

    def __post_init__(self) -> None:
        if min(self.ngram, self.bands, self.rows) < 1 or self.bands * self.rows > MOST_HASHES:
            raise ConfigError(
                f"ngram {self.ngram}, bands {self.bands}, rows {self.rows} cannot be",
                where="command line",
                fix=f"1 or more each, and at most {MOST_HASHES} bands x rows",
            )
        if self.jaccard is not None and not 0 < self.jaccard <= 1:
            raise ConfigError(f"--jaccard {self.jaccard} is no similarity", where="command line", fix="a number above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class CleaningSettings:
    """Stages, by name; None, False and () are stages that are off.

    languages: codes to keep; url_key: field with the address; code: documents that `pii` leaves alone, None to mask them; blocklist: file
    decontaminate: files and folders of evaluation texts; skip_bad: so many unusable records are allowed
    """

    text_key: str = "text"
    normalise: bool = False
    ftfy: bool = False
    languages: tuple[str, ...] = ()
    identify: Identify = Identify.FASTTEXT
    language_threshold: float = 0.65
    url_key: str | None = None
    exact: bool = False
    filters: tuple[Filter, ...] = ()
    near: NearSettings | None = None
    pii: bool = False
    code: Code | None = None
    decontaminate: tuple[str, ...] = ()
    blocklist: str | None = None
    form: Form = Form.JSONL
    seed: int = 1
    tasks: int = 1
    skip_bad: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.tasks <= MOST_TASKS:
            raise ConfigError(f"--tasks {self.tasks} cannot be", where="command line", fix=f"1 to {MOST_TASKS}")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"--seed {self.seed} cannot be", where="command line", fix="0 to 2**32 - 1")

    def contents(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {name: value for name, value in _plain(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value
