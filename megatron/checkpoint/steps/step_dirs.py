# SPDX-License-Identifier: Apache-2.0
"""A folder of checkpoints: the names `latest` and `global_step<N>/`, and how a step's folder becomes a checkpoint, all at once, and goes.

At every moment each checkpoint is there whole or not.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from uuid import uuid4

from megatron import fault_injection
from megatron.atomic_io import sync_folder, write_durably
from megatron.checkpoint.steps.manifest import MANIFEST, Finding, Verify, look_at, problems_of, read_manifest
from megatron.errors import CheckpointError, TrainingError
from megatron.log import get_logger

log = get_logger(__name__)

_STEP = re.compile(r"^global_step(\d+)$")


def step_tag(iteration: int) -> str:
    """Name of the folder of one step."""
    return f"global_step{iteration}"


def step_of(tag: str) -> int | None:
    """The step whose folder has this name; None for another name."""
    match = _STEP.match(tag)
    return None if match is None else int(match.group(1))


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a folder, ascending."""
    if not directory.is_dir():
        return []
    steps = (step_of(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(step for step in steps if step is not None)


def named_step(load: Path, iteration: int | None = None) -> tuple[Path, int | None]:
    """The folder of checkpoints and the step that `load` and `iteration` mean, where `load` may be one step's own folder.

    >>> named_step(Path("out/global_step20"))[1], named_step(Path("out"), 20)[1]
    (20, 20)
    """
    step = step_of(load.name)
    if step is None or saved_steps(load) or (load / "latest").exists() or iteration not in (None, step):
        return load, iteration
    return load.parent, step


def latest_tag(directory: Path) -> str | None:
    """What `latest` names, there or not; None without the file."""
    try:
        return (directory / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def holds(directory: Path, tag: str) -> bool:
    """Whether `tag` names a folder right inside `directory`; a path that leads elsewhere is not followed.

    >>> holds(Path("."), ".."), holds(Path("."), "../other"), holds(Path("."), "")
    (False, False, False)
    """
    return Path(tag).name == tag not in ("", "..") and (directory / tag).is_dir()


def find_tag(directory: Path, iteration: int | None = None) -> str:
    """The folder name of `iteration`, or the one that `latest` names; nothing is verified.

    Raises CheckpointError when there is none, listing the steps that are there.
    """
    steps = saved_steps(directory)
    there = f"steps there: {', '.join(map(str, steps))}" if steps else "there is no global_step<N> folder in it"
    if iteration is not None:
        if iteration not in steps:
            fix = "set `iteration` to one of them"
            raise CheckpointError(f"no checkpoint of iteration {iteration}; {there}", where=str(directory), fix=fix)
        return step_tag(iteration)
    tag = latest_tag(directory)
    if tag is not None:
        if holds(directory, tag):
            return tag
        what = f"`latest` names {tag}, which is not there; {there}"
        raise CheckpointError(what, where=str(directory / "latest"), fix="set `iteration` to one of them")
    what = f"no checkpoint found: no file named latest; {there}"
    raise CheckpointError(what, where=str(directory), fix="correct `load`, or set `iteration` to a step that is there")


def write_latest(directory: Path, tag: str) -> None:
    """Point `latest` at `tag`, aside and renamed, flushed to disk."""
    write_durably(directory / "latest", tag)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a step's folder to `<name>.<why>` (-2, -3, ... where that is taken), so that it is no checkpoint any more."""
    place, number = folder.with_name(f"{folder.name}.{why}"), 1
    while place.exists() or place.is_symlink():
        number += 1
        place = folder.with_name(f"{folder.name}.{why}-{number}")
    folder.rename(place)
    return place


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
    try:
        aside.rename(final)
    except OSError:
        if replaces:
            old.rename(final)
        raise
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


UPLOADING = ".uploading"
"""Folder beside the checkpoints; a file in it, named as a step's folder, says that this step is being copied elsewhere."""

EXPORTING = ".exporting"
"""The same for the export of checkpoints to another format."""


def outdated(steps: Collection[int], *, keep: int, protected: Collection[int], every: int | None = None) -> list[int]:
    """Steps to delete: all but the `keep` newest and the multiples of `every`, and never a protected one.

    What is protected counts among the newest if it is.

    >>> outdated([0, 10, 20, 30, 40], keep=2, protected={0})
    [10, 20]
    >>> outdated([0, 10, 20, 30, 40, 50], keep=1, protected=(), every=20)
    [10, 30]
    """
    newest = sorted(steps)[-max(1, keep) :]
    return [step for step in sorted(steps) if step not in newest and step not in protected and (every is None or step % every)]


def removable(
    directory: Path, *, keep: int, protected: Collection[int] = (), every: int | None = None, verify: Verify = Verify.SIZE
) -> list[int]:
    """Steps of `directory` that may be deleted; nothing is.

    A step that its manifest contradicts, as far as `verify` looks, is none of the `keep`: it goes once it is older than all of them.
    A step without a manifest counts, but never instead of the newest one that has its manifest's word.
    Links, and steps of which an upload is under way, stay.
    """
    steps = saved_steps(directory)
    findings = {step: look_at(directory / step_tag(step), verify) for step in steps}
    sound = [step for step in steps if not findings[step].bad]
    if not sound:
        return []
    stay = {*protected, *[step for step in steps if findings[step].whole][-1:]}
    stay |= {step for step in steps if (directory / step_tag(step)).is_symlink() or uploading(directory, step)}
    oldest_kept = sound[-max(1, keep) :][0]
    counted = [step for step in steps if step in sound or step < oldest_kept]
    return outdated(counted, keep=keep, protected=stay, every=every)


def uploading(directory: Path, step: int) -> bool:
    """Whether a copy of this step to elsewhere, or its export, is under way."""
    return any((directory / place / step_tag(step)).exists() for place in (UPLOADING, EXPORTING))


def prune(directory: Path, *, keep: int, protected: Collection[int], every: int | None = None, verify: Verify = Verify.SIZE) -> list[int]:
    """Delete what `removable` names; returns their steps. Call after a save is complete, on one rank.

    A folder is renamed before it is deleted, so that half of one is never taken for a checkpoint.
    A folder that cannot be deleted is named in a warning: a full or read-only disk must not end a run that has just saved.
    """
    deleted: list[int] = []
    try:
        old = removable(directory, keep=keep, protected=protected, every=every, verify=verify)
    except OSError as error:
        log.warning(f"old checkpoints could not be looked at: {error}")
        return deleted
    for step in old:
        try:
            remove(directory / step_tag(step))
        except OSError as error:
            log.warning(f"an old checkpoint could not be deleted: {error}")
            continue
        deleted.append(step)
    if deleted:
        log.info(f"deleted old checkpoints (keep_last_n_checkpoints: {keep}): {', '.join(map(step_tag, deleted))} in {directory}")
    return deleted


def survey(place: Path, verify: Verify) -> dict[str, Finding]:
    """{name: finding} of every step in a folder of checkpoints, by number; or of the one step that `place` is.

    Raises CheckpointError when there is no step.
    """
    steps = saved_steps(place)
    if steps:
        return {step_tag(step): look_at(place / step_tag(step), verify) for step in steps}
    if place.is_dir() and (step_of(place.name) is not None or (place / MANIFEST).exists()):
        return {place.name: look_at(place, verify)}
    raise CheckpointError("no global_step<N> folder is there", where=str(place), fix="name a step's folder, or the folder of several")
