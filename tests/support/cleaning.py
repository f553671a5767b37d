# SPDX-License-Identifier: Apache-2.0
"""Documents with known flaws for the cleaning tests, and a run over them. Knows no stage's code."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.data.cleaning.plan import CleaningSettings
from megatron.data.cleaning.run import LocalTasks, clean

SMALL = "the of and to in that with for on was are be this from they have had not but what all were when we there can".split()


def sentence(rng: random.Random) -> str:
    """13 words, every second one of the commonest of English, the others made up."""
    words = [rng.choice(SMALL) if at % 2 else nonsense(rng, 1)[0] for at in range(13)]
    return f"{' '.join(words).capitalize()}."


def prose(rng: random.Random, sentences: int = 12) -> str:
    """A text that every quality filter keeps."""
    return "\n".join(" ".join(sentence(rng) for _ in range(3)) for _ in range(sentences // 3))


def nonsense(rng: random.Random, words: int) -> list[str]:
    """Words that hardly ever occur twice."""
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(words)]


def near_pair(rng: random.Random, changed: int, ratio: int, ngram: int = 5) -> tuple[str, str]:
    """Two texts of `changed` x `ratio` shingles of which `changed` differ: similarity (ratio - 1) / (ratio + 1)."""
    words = nonsense(rng, changed * ratio + ngram - 1)
    other = list(words)
    block = changed - ngram + 1  # replacing one word changes `ngram` runs, every further one another
    start = rng.randrange(ngram, len(words) - block - ngram)
    other[start : start + block] = nonsense(rng, block)
    return " ".join(words), " ".join(other)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_output(folder: Path) -> list[dict[str, Any]]:
    """Records of all shards, in order."""
    found = []
    for shard in sorted(folder.glob("part-*")):
        if shard.suffix == ".parquet":
            import pyarrow.parquet

            found += pyarrow.parquet.read_table(shard).to_pylist()
        else:
            raw = gzip.decompress(shard.read_bytes()) if shard.suffix == ".gz" else shard.read_bytes()
            found += [json.loads(line) for line in raw.splitlines()]
    return found


def run(
    records: Sequence[dict[str, Any]], folder: Path, *, workers: int = 1, **settings: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(cleaned records, report)."""
    source = write_lines(folder / "in.jsonl", records)
    report = clean([str(source)], folder / "out", CleaningSettings(**settings), LocalTasks(workers))
    assert report is not None
    return read_output(folder / "out"), report


def dropped(report: dict[str, Any]) -> dict[str, int]:
    """stage/rule -> how many."""
    found: dict[str, int] = report["dropped"]
    return found
