# SPDX-License-Identifier: Apache-2.0
"""The last job of a cleaning run: writes the report and gives the output its name. Knows no stage."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron.data.cleaning.pipeline import OUTPUT
from megatron.data.cleaning.sources import STAGE as READ
from megatron.data.cleaning.stage_stats import StageStats, merged

REPORT = "report.json"
VERSION = 1


@dataclass(frozen=True)
class Publish:
    """Step of one task. said: settings and what else the report repeats; stats_folders: folders with counts, in the order of the stages"""

    work: str
    output: str
    said: dict[str, Any]
    stats_folders: tuple[str, ...]

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Shards without a document go, the folder is renamed whole."""
        output = Path(self.work) / "output"
        if not output.exists():
            return  # a run that was killed after this step's rename, before it was marked complete
        stage_stats = merged(path for folder in self.stats_folders for path in sorted(Path(folder).glob("*.json")))
        shards = sorted(output.glob("part-*"))
        kept = [shard for shard in shards if shard.stat().st_size and not _empty_gzip(shard)] or shards[:1]
        for shard in set(shards) - set(kept):
            shard.unlink()
        (output / REPORT).write_bytes(
            orjson.dumps(report(stage_stats, self.said, kept), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        )
        os.replace(output, self.output)


def _empty_gzip(shard: Path) -> bool:
    if shard.suffix != ".gz":
        return False
    with shard.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return file.read() == bytes(4)  # FORMAT: a gzip file ends with the length of its contents modulo 2**32


def report(stage_stats: StageStats, said: dict[str, Any], shards: list[Path]) -> dict[str, Any]:
    """What became of the documents. The same input and settings give the same report."""
    counted = dict(stage_stats.stages)
    came = counted.pop(READ, {"documents": 0, "characters": 0})
    left = counted.pop(OUTPUT, {"documents": 0, "characters": 0})
    stages = []
    for name, counts in counted.items():
        rules = {key.split("/", 1)[1]: entry for key, entry in stage_stats.dropped.items() if key.startswith(f"{name}/")}
        dropped = sum(entry["count"] for entry in rules.values())
        stages.append(
            {
                "stage": name,
                "documents_in": counts["documents"],
                "documents_out": counts["documents"] - dropped,
                "changed": dict(sorted(stage_stats.changed.get(name, {}).items())),
                "dropped": {rule: rules[rule] for rule in sorted(rules)},
                "examples": stage_stats.examples.get(name, []),
            }
        )
    bad = stage_stats.dropped.get(f"{READ}/bad record", {"count": 0, "examples": []})
    return {
        "version": VERSION,
        "input": {**said["input"], "documents": came["documents"], "bad_records": bad},
        "output": {**left, "files": [shard.name for shard in shards]},
        "dropped": {key: entry["count"] for key, entry in sorted(stage_stats.dropped.items())},
        "stages": stages,
        "settings": {name: value for name, value in said.items() if name != "input"},
    }
