# SPDX-License-Identifier: Apache-2.0
"""From settings to the jobs of a run, one after the other, with a barrier between them. Knows the stages; runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.data.cleaning.backend import datatrove
from megatron.data.cleaning.blocklist import BlockListed, read_blocklist
from megatron.data.cleaning.decontamination import Decontaminate, index_tasks
from megatron.data.cleaning.exact import RANGES, FindSame, Fingerprint
from megatron.data.cleaning.language import FUNCTION_WORDS, ByFastText, ByFunctionWords
from megatron.data.cleaning.minhash_dedup import ChooseNear
from megatron.data.cleaning.normalise import Normalise
from megatron.data.cleaning.parquet import GatherSchema, WriteParquet
from megatron.data.cleaning.pii import MaskPII
from megatron.data.cleaning.pipeline import DocumentSource, Segment, Store, Stored, WriteLines
from megatron.data.cleaning.publish import Publish
from megatron.data.cleaning.quality import Quality
from megatron.data.cleaning.settings import CleaningSettings, Form, Identify
from megatron.data.cleaning.similarity import StoreShingles
from megatron.data.cleaning.sources import Reader
from megatron.data.cleaning.stage import DocumentStage
from megatron.errors import ConfigError

Step = Callable[[Any, int, int], Any]


@dataclass(frozen=True)
class Job:
    """Steps that `tasks` tasks run, each on its part; the next job starts when all have ended."""

    name: str
    steps: tuple[Step, ...]
    tasks: int


def plan(settings: CleaningSettings, reader: Reader, work: Path, output: Path, said: dict[str, Any]) -> list[Job]:
    """The jobs of a run; all they write lies in `work` until the last one renames it to `output`. said: goes into the report"""
    planner = _Planner(settings, work, reader)
    first: list[DocumentStage] = [Normalise(settings.ftfy)] if settings.normalise else []
    first += _language(settings)
    planner.stages += first
    if settings.url_key is not None:
        planner.same("url", "same address", settings.url_key)
    if settings.exact:
        planner.same("exact", "same text")
    if settings.filters:
        planner.stages.append(Quality(settings.filters, _stop_words(settings)))
    if settings.near is not None:
        planner.near()
    extra = planner.last_stages()
    planner.write()
    said = settings.contents() | extra | said
    planner.jobs.append(Job("publish", (Publish(str(work), str(output), said, tuple(planner.stats_folders)),), 1))
    return planner.jobs


def _language(settings: CleaningSettings) -> list[DocumentStage]:
    if not settings.languages:
        return []
    if settings.identify is Identify.FASTTEXT:
        datatrove().language_filter(list(settings.languages), settings.language_threshold)  # says now what is missing
        return [ByFastText(settings.languages, settings.language_threshold)]
    unknown = set(settings.languages) - set(FUNCTION_WORDS)
    if unknown:
        raise ConfigError(
            f"the word lists do not know the language {', '.join(sorted(unknown))}",
            where="--lang",
            fix=f"known: {', '.join(FUNCTION_WORDS)}; --lang-backend fasttext knows 176",
        )
    return [ByFunctionWords(settings.languages)]


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
        self.source: DocumentSource = reader
        self.stages: list[DocumentStage] = []
        self.jobs: list[Job] = []
        self.stats_folders: list[str] = []

    def _stats_folder(self) -> str:
        stage_stats = str(self.work / "books" / str(len(self.stats_folders)))
        self.stats_folders.append(stage_stats)
        return stage_stats

    def _segment(self) -> Segment:
        stage_stats = self._stats_folder()
        segment = Segment(self.source, tuple(self.stages), stage_stats, self.settings.pii)
        self.stages = []
        return segment

    def same(self, name: str, rule: str, url_key: str | None = None) -> None:
        """Barrier: hashes, then equal ones."""
        folder = self.work / name
        stored, runs, removed = (str(folder / part) for part in ("documents", "runs", "removed"))
        self._add(f"{name}-read", self._segment(), Store(stored), Fingerprint(runs, url_key))
        self.jobs.append(Job(f"{name}-find", (FindSame(runs, removed),), RANGES))
        self.source = Stored(stored, removed, name, rule)

    def near(self) -> None:
        """Barrier: signatures, pairs in every band, groups."""
        near = self.settings.near
        assert near is not None
        folder = self.work / "near"
        stored, signatures, pairs, removed = (str(folder / part) for part in ("documents", "signatures", "pairs", "removed"))
        backend = datatrove()
        minhash = backend.MinHash(near.ngram, near.bands, near.rows, self.settings.seed)
        self._add("near-sign", self._segment(), Store(stored), backend.Signatures(signatures, minhash))
        self.jobs.append(Job("near-pair", (backend.Buckets(signatures, pairs, minhash),), near.bands))
        choose = ChooseNear(pairs, stored, removed, near.keep)
        if near.jaccard is not None:
            shingles = str(folder / "shingles")
            self._add("near-check", StoreShingles(pairs, stored, shingles, near.ngram))
            choose = replace(choose, shingles=shingles, least=near.jaccard)
        self.jobs.append(Job("near-choose", (choose,), 1))
        self.source = Stored(stored, removed, "near", "near duplicate")

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
        form = self.settings.form
        output, lines = str(self.work / "output"), str(self.work / "lines")
        key = self.settings.text_key
        segment, stage_stats = self._segment(), self._stats_folder()
        if form is not Form.PARQUET:
            self._add("write", segment, WriteLines(output, key, stage_stats, form is Form.JSONL_GZ))
            return
        # One schema for all shards: it is known once every record was seen.
        schemas = str(self.work / "schemas")
        self._add("write", segment, WriteLines(lines, key, stage_stats))
        self._add("schema", GatherSchema(lines, schemas))
        self._add("parquet", WriteParquet(lines, schemas, output))

    def _add(self, name: str, *steps: Step) -> None:
        self.jobs.append(Job(name, steps, self.settings.tasks))
