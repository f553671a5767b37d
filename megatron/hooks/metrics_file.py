# SPDX-License-Identifier: Apache-2.0
"""`metrics.jsonl`: one JSON object per line, written and read here. Knows no hook and no tracker.

A training row holds iteration, lm_loss (and the objective's other metrics), learning_rate, grad_norm, tokens_per_second,
mfu (percent, null without a known peak), samples, tokens, seconds and time (Unix time, s); where asked for, also parameter_norm,
gradient_norm, pct_grad_zeros, optimizer_state_norm_<state>, noise_scale (samples) and seconds_<phase>. An evaluation row holds iteration,
valid_<metric> or test_<metric>, and time. What is not finite is null.

The file is only ever appended to. A run that crashed after its last checkpoint leaves rows which the resumed run writes
again; of rows about the same iteration the last one counts, and rows newer than that of a later, smaller iteration are
those of the abandoned attempt. `read_metrics` applies this rule.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends rows; a line torn by a crash is removed first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _repair_tail(path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is in the operating system's hands when this returns."""
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows that count, by iteration: of repeated iterations the last attempt; a torn last line is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = _parse(line)
        if row is None:
            continue
        while rows and _superseded(rows[-1], row):
            rows.pop()
        rows.append(row)
    return rows


def _superseded(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `new`, which stands later in the file, takes the place of `old`. A step's training row stands before its others."""
    if old["iteration"] != new["iteration"]:
        return bool(old["iteration"] > new["iteration"])
    return _kind(new) in ("train", _kind(old))


def _kind(row: Mapping[str, Any]) -> str:
    """train, valid or test."""
    return next((kind for kind in ("valid", "test") if any(name.startswith(f"{kind}_") for name in row)), "train")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "iteration" in row else None


def _repair_tail(path: Path) -> None:
    """End the file with a whole line: complete a row that lacks only its newline, cut off a torn one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - (1 << 20))
        file.seek(start)
        tail = file.read()
        if tail.endswith(b"\n"):
            return
        cut = tail.rfind(b"\n") + 1
        if _parse(tail[cut:].decode("utf-8", "replace")) is not None:
            file.write(b"\n")
        else:
            file.truncate(start + cut)
