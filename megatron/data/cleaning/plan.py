# SPDX-License-Identifier: Apache-2.0
"""What a cleaning run is asked to do, and the jobs that do it: one after the other, with a barrier between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from megatron.data.cleaning import pipeline
from megatron.data.cleaning.decontamination import Decontaminate, index_tasks
from megatron.data.cleaning.deduplication import RANGES, Keep, choose_near, find_same, store_shingles, write_hashes
from megatron.data.cleaning.document import DocumentStage, Step
from megatron.data.cleaning.filters import FUNCTION_WORDS, BlockListed, Filter, Language, Normalise, Quality, datatrove, read_blocklist
from megatron.data.cleaning.pii import Code, MaskPII
from megatron.data.cleaning.sources import Reader
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


@dataclass(frozen=True)
class Job:
    """Steps that `tasks` tasks run, each on its part; the next job starts when all have ended."""

    name: str
    steps: tuple[Step, ...]
    tasks: int


def plan(settings: CleaningSettings, reader: Reader, work: Path, output: Path, said: dict[str, Any]) -> list[Job]:
    """The jobs of a run; all they write lies in `work` until the last one renames it to `output`. said: goes into the report"""
    planner = _Planner(settings, work, reader)
    if settings.normalise:
        planner.stages.append(Normalise(settings.ftfy))
    if settings.languages:
        planner.stages.append(_language(settings))
    if settings.url_key is not None:
        planner.same("url", "same address", settings.url_key)
    if settings.exact:
        planner.same("exact", "same text")
    if settings.filters:
        planner.stages.append(Quality(settings.filters, _stop_words(settings)))
    if settings.near is not None:
        planner.near(settings.near)
    extra = planner.last_stages()
    planner.write()
    said = orjson.loads(orjson.dumps(settings)) | extra | said
    last = partial(pipeline.publish, work=work, output=output, said=said, stats_folders=tuple(planner.stats_folders))
    planner.add("publish", last, tasks=1)
    return planner.jobs


def _language(settings: CleaningSettings) -> Language:
    if settings.identify is Identify.FASTTEXT:
        datatrove().language_filter(list(settings.languages), settings.language_threshold)  # says now what is missing
        return Language(settings.languages, settings.language_threshold)
    if unknown := set(settings.languages) - set(FUNCTION_WORDS):
        raise ConfigError(
            f"the word lists do not know the language {', '.join(sorted(unknown))}",
            where="--lang",
            fix=f"known: {', '.join(FUNCTION_WORDS)}; --lang-backend fasttext knows 176",
        )
    return Language(settings.languages)


def _stop_words(settings: CleaningSettings) -> tuple[str, ...] | None:
    """None: Gopher's own, for English. Of a language whose words are not known none are asked for."""
    if not settings.languages or settings.languages == ("en",):
        return None
    return tuple(sorted({word for code in settings.languages for word in FUNCTION_WORDS.get(code, ())}))


class _Planner:
    """Collects stages into a segment, and ends it at every barrier. stats_folders: folders with counts, in the order of the stages"""

    def __init__(self, settings: CleaningSettings, work: Path, reader: Reader) -> None:
        self.settings = settings
        self.work = work
        self.source: pipeline.DocumentSource = reader
        self.stages: list[DocumentStage] = []
        self.jobs: list[Job] = []
        self.stats_folders: list[Path] = []

    def add(self, name: str, *steps: Step, tasks: int | None = None) -> None:
        """A job, of as many tasks as the input was divided into or of another number."""
        self.jobs.append(Job(name, steps, tasks or self.settings.tasks))

    def _stats_folder(self) -> Path:
        self.stats_folders.append(self.work / "books" / str(len(self.stats_folders)))
        return self.stats_folders[-1]

    def _segment(self) -> pipeline.Segment:
        segment = pipeline.Segment(self.source, tuple(self.stages), self._stats_folder(), self.settings.pii)
        self.stages = []
        return segment

    def same(self, name: str, rule: str, url_key: str | None = None) -> None:
        """Barrier: hashes, then equal ones."""
        folder = self.work / name
        store, hashes = partial(pipeline.store, folder=folder), partial(write_hashes, folder=folder, url_key=url_key)
        self.add(f"{name}-read", self._segment(), store, hashes)
        self.add(f"{name}-find", partial(find_same, folder=folder), tasks=RANGES)
        self.source = pipeline.Stored(folder, name, rule)

    def near(self, near: NearSettings) -> None:
        """Barrier: signatures, pairs in every band, groups."""
        folder, backend = self.work / "near", datatrove()
        given = {"folder": folder, "minhash": backend.minhash_config(near.ngram, near.bands, near.rows, self.settings.seed)}
        self.add("near-sign", self._segment(), partial(pipeline.store, folder=folder), partial(backend.write_signatures, **given))
        self.add("near-pair", partial(backend.find_pairs, **given), tasks=near.bands)
        if near.jaccard is not None:
            self.add("near-check", partial(store_shingles, folder=folder, ngram=near.ngram))
        self.add("near-choose", partial(choose_near, folder=folder, keep=near.keep, least=near.jaccard), tasks=1)
        self.source = pipeline.Stored(folder, "near", "near duplicate")

    def last_stages(self) -> dict[str, Any]:
        """Stages that need no barrier; returns what the report says of them."""
        settings = self.settings
        said: dict[str, Any] = {}
        if settings.pii:
            self.stages.append(MaskPII(settings.code))
        if settings.decontaminate:
            index = self.work / "tasks.npz"
            gathered = index_tasks(settings.decontaminate, index)
            self.stages.append(Decontaminate(str(index), tuple(gathered.tasks)))
            said["evaluation"] = {"tasks": gathered.tasks, "texts": gathered.texts, "too short to be found": gathered.short}
        if settings.blocklist is not None:
            entries = read_blocklist(Path(settings.blocklist))
            self.stages.append(BlockListed(settings.blocklist, entries.sha256))
            said["blocklist"] = {"file": settings.blocklist, "sha256": entries.sha256, "entries": entries.entries}
        return said

    def write(self) -> None:
        """The last segment, and the output's files."""
        form, parquet = self.settings.form, self.settings.form is Form.PARQUET
        write = partial(
            pipeline.write_lines,
            folder=self.work / ("lines" if parquet else pipeline.OUTPUT),
            text_key=self.settings.text_key,
            compress=form is Form.JSONL_GZ,
        )
        self.add("write", self._segment(), partial(write, stage_stats=self._stats_folder()))
        if parquet:
            # One schema for all shards: it is known once every record was seen.
            self.add("schema", partial(pipeline.gather_schema, work=self.work))
            self.add("parquet", partial(pipeline.write_parquet, work=self.work))
