# SPDX-License-Identifier: Apache-2.0
"""The stages LOAD, DETECT, COUNT, EXPORT, TOKENIZE one after the other. A stage that was done with the same data and settings is not
done again. Knows no flags."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from megatron.data.chat.preview import preview
from megatron.data.hf import hub
from megatron.data.hf.arrays import Arrays
from megatron.data.hf.detect import Found, How, detect
from megatron.data.hf.encoding import TEMPLATED, Opened, encoding_of, open_tokens
from megatron.data.hf.local import local_source
from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.hf.request import PrepareRequest, check
from megatron.data.hf.scan import count, export
from megatron.data.hf.stage_cache import PrepareStage, Result, StageCache
from megatron.data.indexed_dataset import data_file, index_file
from megatron.data.preprocess.blocks import BlockStart
from megatron.data.preprocess.reading import FIRST_RECORDS
from megatron.data.preprocess.resumable_output import Counts
from megatron.data.preprocess.sources import Files, RecordSource
from megatron.data.preprocess.writer import Options, stream_prefix, write
from megatron.errors import DataError, NeoXError
from megatron.hub.client import Sleep
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)
Rows = Files | Arrays | hub.HubRows
NO_TOKENS = ("_label", "_reward")
PATHS = {
    "text": ("train_data_paths",),
    "messages": ("train_data_paths",),
    "messages_label": ("train_label_data_paths",),
    "messages_reward": ("train_reward_data_paths",),
    "chosen": ("pos_train_data_paths",),
    "chosen_label": ("pos_train_label_data_paths",),
    "rejected": ("neg_train_data_paths",),
    "rejected_label": ("neg_train_label_data_paths",),
}
"""Stream -> the YAML key that names it; `lengths` has none."""


@dataclass(frozen=True)
class PreparedDataset:
    """results: what `pipeline_results.json` says, without the stages; fresh: stages that were done now"""

    results: dict[str, Any]
    fresh: tuple[str, ...]


def prepare(request: PrepareRequest, *, wait: Sleep = time.sleep) -> PreparedDataset:
    """Write `<folder>/<folder's name>_<stream>_document.bin/.idx`, `dataset.jsonl` and `pipeline_results.json`, as wished.

    Raises DataError or ConfigError; then the results say status "failed" and why, unless nothing may be written.
    """
    check(request)
    stage_cache = StageCache(None if request.count_only else request.folder, _head(request))
    try:
        findings = _Run(request, stage_cache, wait).stages()
    except BaseException as error:
        what = error.what if isinstance(error, NeoXError) else f"{type(error).__name__}: {error}"
        stage_cache.save("failed", error=redact(what))
        raise
    return PreparedDataset(stage_cache.save("completed", **findings), tuple(stage_cache.fresh))


def _head(request: PrepareRequest) -> dict[str, Any]:
    data = request.data
    return {"dataset": data.dataset, "subset": data.subset, "split": data.split, "output_dir": str(request.folder)}


class _Run:
    """One pass through the stages."""

    def __init__(self, request: PrepareRequest, stage_cache: StageCache, wait: Sleep) -> None:
        self.request, self.stage_cache, self.wait = request, stage_cache, wait
        self.options = Options(workers=request.workers, skip_bad=request.skip_bad)

    def stages(self) -> dict[str, Any]:
        """All that are wanted; the findings."""
        request, stage_cache = self.request, self.stage_cache
        source: Rows = local_source(request.data) or hub.find(
            request.data, batch_rows=request.batch_rows, workers=request.download_workers, wait=self.wait
        )
        if isinstance(source, hub.HubRows):
            # Offline the Hub does not tell the commit; the one that was read before is in the cache.
            source = replace(source, commit=stage_cache.recall("commit", asdict(request.data), source.commit))
        facts = source.facts()
        loaded = stage_cache.run(PrepareStage.LOAD, facts, lambda: (_load(source), ()))
        kept = stage_cache.run(PrepareStage.DETECT, [facts, asdict(request.columns)], lambda: (_detect(source, request), ()))
        found = Found(How(kept["how"]), tuple((role, column) for role, column in kept["columns"]))
        log.info("%s: columns %s", found.how.value, ", ".join(found.names))
        if found.how is How.WRITTEN:
            log.warning("--skip-chat-template writes Python's notation of the turns into the training text; it is rarely what is wanted")
        chosen = _select(source, found.names)
        tokens = request.tokenize and not request.count_only
        counts = request.count and not tokens
        opened = open_tokens(request.tokens, found.how, ids=tokens or counts, fetch=lambda name: hub.tokenizer_folder(name, self.wait))
        if opened.template is not None and opened.template.moment is not None:
            # A template that tells the day would make every run another one.
            moment = stage_cache.keep("moment", [facts, opened.template.digest], opened.template.moment)
            opened = replace(opened, template=replace(opened.template, moment=moment))
        shape = RecordAdapter(found, opened.template)
        depends = [facts, repr(shape), request.skip_bad]
        measured = [*depends, opened.digest, request.tokens.max_length]
        result: dict[str, Any] = {}
        if counts:
            result = stage_cache.run(PrepareStage.COUNT, measured, lambda: self._count(chosen, found, opened))
        if request.export and not request.count_only:
            path = request.folder / "dataset.jsonl"
            exported = stage_cache.run(
                PrepareStage.EXPORT, depends, lambda: (export(chosen, shape, path, skip_bad=request.skip_bad), (path,))
            )
            result = {"jsonl_path": str(path), "num_documents": exported["lines"], **result}
        if tokens:
            result |= stage_cache.run(PrepareStage.TOKENIZE, measured, lambda: self._tokenize(chosen, found, opened))
            result |= self._written(result["streams"])
        return {**_described(loaded, found, facts), **result}

    def _count(self, source: RecordSource, found: Found, opened: Opened) -> Result:
        encoder, _ = encoding_of(source, found, opened, max_length=self.request.tokens.max_length, workers=self.request.workers)
        counts, tokens = count(source, encoder, self.options)
        return _numbers(counts, tokens, found), ()

    def _tokenize(self, source: RecordSource, found: Found, opened: Opened) -> Result:
        request = self.request
        encoder, made_with = encoding_of(source, found, opened, max_length=request.tokens.max_length, workers=request.workers)
        about = {
            "command": shlex.join(sys.argv),
            "dataset": source.facts() if isinstance(source, hub.HubRows) else request.data.dataset,
            "form": found.how.value,
            "columns": list(found.names),
            **made_with,
        }
        written = write(source, encoder, request.prefix, replace(self.options, about=about))
        files = [ending(prefix) for prefix in written.files.values() for ending in (data_file, index_file)]
        result = {**_numbers(written.counts, written.tokens, found), "streams": list(written.files), "tokenized": True}
        if found.how in TEMPLATED:
            result["preview"] = preview(
                cast(Any, encoder.open()), next((block.read().records for block in source.blocks(BlockStart())), [])
            )
        return {**result, "tokenize_time": round(written.seconds, 3)}, files

    def _written(self, streams: Sequence[str]) -> dict[str, Any]:
        prefixes = {stream: stream_prefix(self.request.prefix, stream) for stream in streams}
        first = next(iter(prefixes.values()))
        paths = {key: [str(prefixes[stream])] for stream in streams for key in PATHS.get(stream, ())}
        return {"bin_path": str(data_file(first)), "idx_path": str(index_file(first)), "paths": paths}


def _select(source: Rows, columns: tuple[str, ...]) -> RecordSource:
    if isinstance(source, hub.HubRows):
        return source.select(columns)
    return replace(source, columns=columns) if isinstance(source, Files) else source


def _load(source: Rows) -> dict[str, Any]:
    if isinstance(source, hub.HubRows):
        return {"rows": len(source.rows()), "bytes": source.total_bytes, "commit": source.commit}
    return {"files": len(source.files), "bytes": source.total_bytes}


def _detect(source: RecordSource, request: PrepareRequest) -> dict[str, Any]:
    first: list[dict[str, Any]] = []
    for block in source.blocks(BlockStart()):
        read = block.read()
        first += read.records[: FIRST_RECORDS - len(first)]
        if read.faults and not first:
            number, what = read.faults[0]
            raise DataError(what, where=block.label(number), fix="fix the file, or name another")
        if len(first) >= FIRST_RECORDS:
            break
    found = detect(first, request.columns)
    return {"how": found.how.value, "columns": [list(pair) for pair in found.columns]}


def _numbers(counts: Counts, tokens: dict[str, int], found: Found) -> dict[str, Any]:
    """FORMAT: `token_count` is without the end-of-document token that is put behind every text."""
    written = sum(number for name, number in tokens.items() if not name.endswith(NO_TOKENS) and name != "lengths")
    total = written - counts.documents if found.how not in TEMPLATED else written
    return {
        "num_documents": counts.documents,
        "token_count": total,
        "tokens_per_doc": round(total / max(counts.documents, 1), 3),
        "tokens_written": tokens,
        "trained_tokens": counts.trained,
        "dropped": counts.dropped,
        "bad_records": counts.bad,
        "first_bad": counts.first_bad,
        "notes": counts.notes,
    }


def _described(loaded: dict[str, Any], found: Found, facts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": loaded.get("rows"),
        "commit": loaded.get("commit"),
        "form": found.how.value,
        "text_column": ",".join(found.names),
        "is_messages": found.how not in (How.TEXT, How.JOINED),
        "jsonl_path": None,
        "tokenized": False,
        "bin_path": None,
        "idx_path": None,
        "sources": len(facts),
    }
