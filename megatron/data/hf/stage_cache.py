# SPDX-License-Identifier: Apache-2.0
"""Which stages are done: `pipeline_results.json`, written after each."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from megatron.atomic_io import write_durably
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)
RESULTS = "pipeline_results.json"
Result = tuple[dict[str, Any], Iterable[Path]]
"""What a stage found out, and the files it made."""


class PrepareStage(str, Enum):
    """In their order."""

    LOAD = "LOAD"
    DETECT = "DETECT"
    COUNT = "COUNT"
    EXPORT = "EXPORT"
    TOKENIZE = "TOKENIZE"


class StageCache:
    """The stages of one output folder. head: what the file says besides; folder None: nothing is read or written."""

    def __init__(self, folder: Path | None, head: Mapping[str, Any]) -> None:
        self.folder = folder
        self.head = dict(head)
        self.stages, self.kept = _earlier(folder)
        self.wanted: list[str] = []
        self.fresh: list[str] = []
        self.started = time.monotonic()

    def run(self, stage: PrepareStage, depends: Any, action: Callable[[], Result]) -> dict[str, Any]:
        """The stage's findings: those of an earlier run if all it depends on is the same and its files are whole, else the action's."""
        key = _digest(depends)
        self.wanted.append(stage.value)
        earlier = self.stages.get(stage.value)
        if earlier and earlier["key"] == key and files_are_whole(self.folder, earlier["files"]):
            log.info("%s: done before", stage.value)
            result: dict[str, Any] = earlier["result"]
            return result
        log.info("%s", stage.value)
        self.stages.pop(stage.value, None)
        start = time.monotonic()
        result, files = action()
        seconds = round(time.monotonic() - start, 3)
        # The files lie in the folder, which may be moved with its results.
        self.stages[stage.value] = {
            "key": key,
            "seconds": seconds,
            "result": result,
            "files": {path.name: path.stat().st_size for path in files},
        }
        self.fresh.append(stage.value)
        log.info("%s: %.1f s", stage.value, seconds)
        self.save("running")
        return result

    def keep(self, name: str, depends: Any, value: str) -> str:
        """The value an earlier run had under this name, if all it depends on is the same; else this one, kept for later runs."""
        key = _digest(depends)
        if self.kept.get(name, {}).get("key") != key:
            self.kept[name] = {"key": key, "value": value}
        return str(self.kept[name]["value"])

    def recall(self, name: str, depends: Any, value: str | None) -> str | None:
        """The value, kept for later runs; where it is None, that of an earlier run."""
        if value is not None:
            self.kept.pop(name, None)
        elif self.kept.get(name, {}).get("key") != _digest(depends):
            return None
        return self.keep(name, depends, value or "")

    def save(self, status: str, **more: Any) -> dict[str, Any]:
        """Write the file; what it says."""
        times = {name: self.stages[name]["seconds"] for name in self.wanted if name in self.stages}
        content = {**self.head, **more, "status": status, "elapsed_time": round(time.monotonic() - self.started, 3), "stage_times": times}
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                told = {**content, "stages": self.stages, "kept": self.kept}
                write_durably(self.folder / RESULTS, json.dumps(told, indent=1, default=str) + "\n")
            except OSError as error:
                raise DataError(f"cannot write: {error.strerror}", where=str(self.folder), fix="choose a writable --output-dir") from error
        return content


def files_are_whole(folder: Path | None, sizes: Mapping[str, int]) -> bool:
    """Whether a folder's files are there, of the sizes noted when they were written."""
    if folder is None:
        return not sizes
    found = [(folder / name, size) for name, size in sizes.items()]
    return all(path.exists() and path.stat().st_size == size for path, size in found)


def _digest(depends: Any) -> str:
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _earlier(folder: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stages and kept values of an earlier run; none where its file cannot be read."""
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8")) if folder is not None else {}
        known = [stage.value for stage in PrepareStage if stage.value in content["stages"]]
        stages = {name: {key: content["stages"][name][key] for key in ("key", "seconds", "result", "files")} for name in known}
        return stages, dict(content["kept"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}
