# SPDX-License-Identifier: Apache-2.0
"""The files of this repository as the house rules see them. Knows no rule."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".venv", ".venv-oldest", ".bootstrap", ".hypothesis", "__pycache__", "build", "dist", "golden"}
OUTPUT = {"data", "checkpoints", "logs", "runs", "wandb"}
"""Folders of the root that runs write to."""


def files(*suffixes: str) -> Iterator[Path]:
    """Source files of the repository with one of the suffixes ("" = none), in order."""
    for folder, names, entries in os.walk(ROOT):
        here = Path(folder)
        skip = NOT_OURS | (OUTPUT if here == ROOT else set())
        names[:] = sorted(n for n in names if n not in skip and not n.endswith(("_cache", ".egg-info")))
        for entry in sorted(entries):
            if Path(entry).suffix in suffixes and entry not in NOT_OURS:  # .git is a file in a worktree
                yield here / entry


def relative(path: Path) -> str:
    """The path as shown in messages."""
    return path.relative_to(ROOT).as_posix()
