# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run are deleted once newer ones are there. Knows no content of a checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron.checkpoint.neox_store import saved_steps, step_tag
from megatron.log import get_logger

log = get_logger(__name__)


def outdated(steps: Collection[int], *, keep: int, protected: Collection[int]) -> list[int]:
    """Steps to delete: all but the `keep` newest, and never a protected one (which counts among the newest if it is).

    >>> outdated([0, 10, 20, 30, 40], keep=2, protected={0})
    [10, 20]
    """
    newest = sorted(steps)[-max(1, keep) :]
    return [step for step in sorted(steps) if step not in newest and step not in protected]


def prune(directory: Path, *, keep: int, protected: Collection[int]) -> list[int]:
    """Delete the outdated checkpoints of `directory`; returns their steps. Call after a save is complete, on one rank.

    A folder is renamed before it is deleted, so that half of one is never taken for a checkpoint. Links are left alone.
    A folder that cannot be deleted is named in a warning: a full or read-only disk must not end a run that has just saved.
    """
    deleted = []
    for step in outdated(saved_steps(directory), keep=keep, protected=protected):
        folder = directory / step_tag(step)
        if folder.is_symlink():
            continue
        aside = directory / f"{folder.name}.deleted.{os.getpid()}"
        try:
            folder.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            log.warning(f"an old checkpoint could not be deleted: {error}")
            continue
        deleted.append(step)
    if deleted:
        log.info(f"deleted old checkpoints (keep_last_n_checkpoints: {keep}): {', '.join(map(step_tag, deleted))} in {directory}")
    return deleted
