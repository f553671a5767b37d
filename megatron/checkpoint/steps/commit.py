# SPDX-License-Identifier: Apache-2.0
"""How a finished step folder gets its name, and what a killed run left half done. Knows no content of a checkpoint but its manifest."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from uuid import uuid4

from megatron import fault_injection
from megatron.atomic_io import sync_folder
from megatron.checkpoint.steps.manifest import problems_of, read_manifest
from megatron.errors import CheckpointError, TrainingError
from megatron.log import get_logger

log = get_logger(__name__)

PARTIAL, OLD, DELETED = "partial", "old", "deleted"
_LEFT = re.compile(rf"^(global_step\d+)\.({PARTIAL}|{OLD}|{DELETED})(\..*)?$|^latest\.tmp\.")


def publish(aside: Path, final: Path) -> None:
    """Give a finished folder its name, on disk when this returns. One of that name gives way, and is removed only afterwards.

    Raises TrainingError when there is nothing to publish.
    """
    if not aside.is_dir():
        raise TrainingError("the checkpoint was not written", where=str(aside), fix="check the disk")
    old = final.with_name(f"{final.name}.{OLD}.{uuid4().hex[:8]}")
    replaces = final.exists()
    if replaces:
        final.rename(old)
        fault_injection.point("replace")
    aside.rename(final)
    sync_folder(final.parent)
    if replaces:
        remove(old)


def remove(folder: Path) -> None:
    """Delete a step folder, renamed first, so that half of one is never taken for a checkpoint.

    Raises OSError when it cannot even be renamed.
    """
    name = folder.name.partition(".")[0]
    aside = folder.with_name(f"{name}.{DELETED}.{uuid4().hex[:8]}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def recover(directory: Path) -> list[str]:
    """Clear up after a run that was killed while it saved or deleted; returns what was done, one line each.

    Call on one rank at the start of a run, while it holds the folder's lock.
    """
    done: list[str] = []
    if not directory.is_dir():
        return done
    left = sorted(entry for entry in directory.iterdir() if _LEFT.match(entry.name))
    for entry in left:
        name, kind = entry.name.partition(".")[0], entry.name.split(".")[1]
        if kind == OLD and not (directory / name).exists() and _complete(entry):
            entry.rename(directory / name)
            done.append(f"{name} was being replaced when the run was killed: it is as it was before")
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
            done.append(f"removed {entry.name}, left by a run that was killed")
        else:
            entry.unlink(missing_ok=True)
            done.append(f"removed {entry.name}, left by a run that was killed")
    if done:
        sync_folder(directory)
    return done


def _complete(folder: Path) -> bool:
    """Whether a folder that had its name before still is what it was; one without a manifest is believed."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return manifest is None or not problems_of(folder, manifest, digests=False)
