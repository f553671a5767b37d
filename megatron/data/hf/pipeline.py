# SPDX-License-Identifier: Apache-2.0
"""The stages LOAD, DETECT, COUNT, EXPORT, TOKENIZE one after the other. A stage that was done with the same data and settings is not
done again."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import orjson

from megatron.atomic_io import atomic_write
from megatron.data.chat.pairs import preview
from megatron.data.hf import hub
from megatron.data.hf.detect import Found, How, detect
from megatron.data.hf.encoders import TEMPLATED, Opened, encoding_of, open_tokens
from megatron.data.hf.local import local_source
from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.hf.request import PrepareRequest, check
from megatron.data.hf.stage_cache import PrepareStage, Result, StageCache
from megatron.data.indexed_dataset import data_file, index_file
from megatron.data.preprocess.blocks import FIRST_RECORDS, BlockStart, RecordSource
from megatron.data.preprocess.encoders import Dropped, EncoderSource, Fault
from megatron.data.preprocess.resumable_output import Counts, stream_prefix
from megatron.data.preprocess.sources import Files
from megatron.data.preprocess.writer import EncodingProgress, Options, encoded, open_encoder, tally, write
from megatron.errors import DataError, NeoXError
from megatron.hub.client import Sleep
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)
Rows = Files | hub.HubRows
NO_TOKENS = ("_label", "_reward")
PATHS = {
    "text": "train_data_paths",
    "messages": "train_data_paths",
    "messages_label": "train_label_data_paths",
    "messages_reward": "train_reward_data_paths",
    "chosen": "pos_train_data_paths",
    "chosen_label": "pos_train_label_data_paths",
    "rejected": "neg_train_data_paths",
    "rejected_label": "neg_train_label_data_paths",
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
    data = request.data
    head = {"dataset": data.dataset, "subset": data.subset, "split": data.split, "output_dir": str(request.folder)}
    stage_cache = StageCache(None if request.count_only else request.folder, head)
    try:
        findings = _Run(request, stage_cache, wait).stages()
    except BaseException as error:
        what = error.what if isinstance(error, NeoXError) else f"{type(error).__name__}: {error}"
        stage_cache.save("failed", error=redact(what))
        raise
    return PreparedDataset(stage_cache.save("completed", **findings), tuple(stage_cache.fresh))


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
        chosen = replace(source, columns=found.names)
        tokens = request.tokenize and not request.count_only
        counts = request.count and not tokens
        opened = open_tokens(request.tokens, found.how, ids=tokens or counts, wait=self.wait)
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
            exported = stage_cache.run(PrepareStage.EXPORT, depends, lambda: (export(chosen, shape, path, request.skip_bad), (path,)))
            result = {"jsonl_path": str(path), "num_documents": exported["lines"], **result}
        if tokens:
            result |= stage_cache.run(PrepareStage.TOKENIZE, measured, lambda: self._tokenize(chosen, found, opened))
            result |= self._written(result["streams"])
        return {**_described(loaded, found, facts), **result}

    def _encoding(self, source: RecordSource, found: Found, opened: Opened) -> tuple[EncoderSource, dict[str, Any]]:
        return encoding_of(source, found, opened, max_length=self.request.tokens.max_length, workers=self.request.workers)

    def _count(self, source: RecordSource, found: Found, opened: Opened) -> Result:
        return _numbers(*count(source, self._encoding(source, found, opened)[0], self.options), found), ()

    def _tokenize(self, source: RecordSource, found: Found, opened: Opened) -> Result:
        request = self.request
        encoder, made_with = self._encoding(source, found, opened)
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
            first = next((block.read().records for block in source.blocks(BlockStart())), [])
            result["preview"] = preview(cast(Any, encoder.open()), first)
        return {**result, "tokenize_time": round(written.seconds, 3)}, files

    def _written(self, streams: Sequence[str]) -> dict[str, Any]:
        prefixes = {stream: stream_prefix(self.request.prefix, stream) for stream in streams}
        first = next(iter(prefixes.values()))
        paths = {PATHS[stream]: [str(prefixes[stream])] for stream in streams if stream in PATHS}
        return {"bin_path": str(data_file(first)), "idx_path": str(index_file(first)), "paths": paths}


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


def count(source: RecordSource, encoder_source: EncoderSource, options: Options) -> tuple[Counts, dict[str, int]]:
    """What `write` would write: counts, and tokens of each stream. Nothing is written."""
    encoder = open_encoder(encoder_source, options) if options.workers == 1 else None
    counts, tokens = Counts(), Counter[str]()
    with EncodingProgress(source.total_bytes, counts, options.log_interval, options.num_docs) as progress:
        for done in encoded(source, encoder, encoder_source, BlockStart(), options):
            tally(counts, done, options.skip_bad)
            for name, part in done.batch.streams.items():
                tokens[name] += len(part.values)
            progress.update(counts)
    if counts.documents == 0:
        raise DataError("no record gives a document", where="input", fix="check the columns: are their texts empty?")
    return counts, dict(tokens)


def export(source: RecordSource, shape: RecordAdapter, path: Path, skip_bad: int) -> dict[str, Any]:
    """Write every shaped record as a line of JSON; the file appears when it is whole.

    Raises DataError for bad records beyond `skip_bad`.
    """
    make = shape.open()
    lines = bad = empty = 0
    try:
        with atomic_write(path, "wb") as out:
            for block in source.blocks(BlockStart()):
                read = block.read()
                faults = list(read.faults)
                for number, record in zip(read.numbers, read.records, strict=True):
                    shaped = make(record)
                    if isinstance(shaped, Fault):
                        faults.append((number, shaped.what))
                    elif isinstance(shaped, Dropped) or shaped.get("text") == "":
                        empty += 1
                    else:
                        out.write(orjson.dumps(shaped, default=str, option=orjson.OPT_APPEND_NEWLINE))
                        lines += 1
                bad += len(faults)
                if bad > skip_bad:
                    number, what = min(faults)
                    raise DataError(what, where=block.label(number), fix="fix it, name other columns, or allow some with --skip-bad N")
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror}", where=str(path), fix="free some space, or --no-jsonl") from error
    return {"lines": lines, "empty": empty, "bad": bad}
