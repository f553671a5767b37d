# SPDX-License-Identifier: Apache-2.0
"""The names in a folder of checkpoints: `latest` and `global_step<N>/`. Knows nothing of what is inside a step's folder."""

from __future__ import annotations

import re
from pathlib import Path

from megatron.atomic_io import write_durably
from megatron.errors import CheckpointError

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
    return Path(tag).name == tag != ".." and (directory / tag).is_dir()


def find_tag(directory: Path, iteration: int | None = None) -> str:
    """The folder name of `iteration`, or the one that `latest` names; nothing is verified.

    Raises CheckpointError when there is none, listing the steps that are there.
    """
    steps = saved_steps(directory)
    there = f"steps there: {', '.join(map(str, steps))}" if steps else "there is no global_step<N> folder in it"
    if iteration is not None:
        if iteration not in steps:
            raise CheckpointError(
                f"no checkpoint of iteration {iteration}; {there}", where=str(directory), fix="set `iteration` to one of them"
            )
        return step_tag(iteration)
    tag = latest_tag(directory)
    if tag is not None:
        if tag and holds(directory, tag):
            return tag
        raise CheckpointError(
            f"`latest` names {tag}, which is not there; {there}",
            where=str(directory / "latest"),
            fix="set `iteration` to one of them",
        )
    raise CheckpointError(
        f"no checkpoint found: no file named latest; {there}",
        where=str(directory),
        fix="correct `load`, or set `iteration` to a step that is there",
    )


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
