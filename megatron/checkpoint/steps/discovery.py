# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint is taken: the newest by number that its manifest confirms. All ranks agree."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.checkpoint.steps.manifest import MANIFEST, Finding, Verify, look_at, open_manifest, problems_of
from megatron.checkpoint.steps.step_dirs import find_tag, holds, latest_tag, saved_steps, set_aside, step_of, step_tag, write_latest
from megatron.errors import CheckpointError
from megatron.log import get_logger
from megatron.mpu.collectives import of_all_ranks, on_every_rank, on_first_rank
from megatron.mpu.groups import Group

log = get_logger(__name__)

CORRUPT, ABANDONED = "corrupt", "abandoned"
SEEN_WITHIN_S = 10.0
_POLL_S = 0.1
_MOST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is looked for.

    directory: the folder of checkpoints
    iteration: the step that was asked for; None = the newest
    own:       a run resumes what it has written itself: a bad step is set aside and the one before is taken,
               and steps behind an asked-for one are set aside. Otherwise nothing is touched, and a bad step is an error
    verify:    how closely folders are compared with their manifests
    """

    directory: Path
    iteration: int | None = None
    own: bool = False
    verify: Verify = Verify.FULL


def find(search: Search, world: Group | None = None) -> str:
    """The name of the step folder to load. Call on every rank of `world` (by default this process alone).

    Raises CheckpointError, the same on every rank: naming the bad files, or saying what is there.
    """
    world = world or Group.single()
    tag = _newest(search, world) if search.iteration is None else _asked_for(search, world)
    # What the first rank has renamed or seen a moment ago may take its time to appear on other hosts.
    on_every_rank(partial(wait_until_seen, search.directory / tag, SEEN_WITHIN_S), world)
    return tag


def nothing_saved(directory: Path) -> bool:
    """Whether no run has left anything in `directory` that was, or was meant to be, a checkpoint."""
    if not directory.is_dir():
        return True
    return latest_tag(directory) is None and not any(step_of(entry.name.partition(".")[0]) is not None for entry in directory.iterdir())


def set_aside_after(directory: Path, step: int) -> list[int]:
    """Rename the folders of later steps to `global_step<M>.abandoned`, so that the next start does not take them for newer ones.

    Nothing is deleted. `latest` is moved back where it named one of them. Returns their steps; call on one rank.
    """
    later = [number for number in saved_steps(directory) if number > step]
    hint = latest_tag(directory)
    if hint is not None and step_of(hint) in later:
        write_latest(directory, step_tag(step))
    for number in later:
        place = set_aside(directory / step_tag(number), ABANDONED)
        log.warning("training goes on from step %d: the checkpoint of step %d is set aside as %s", step, number, place)
    return later


def wait_until_seen(folder: Path, within_s: float) -> None:
    """Return when this host sees `folder`. Raises CheckpointError when it does not in time."""
    deadline = time.monotonic() + within_s
    while not os.path.isdir(folder):
        if time.monotonic() >= deadline:
            what = f"rank {os.environ.get('RANK', '0')} on {os.uname().nodename} does not see the checkpoint after {within_s:g} s"
            fix = "put `save` and `load` on a file system that all hosts share, and look whether it is slow"
            raise CheckpointError(what, where=str(folder), fix=fix)
        time.sleep(_POLL_S)


def inspect(folder: Path, verify: Verify, world: Group) -> Finding:
    """Compare a folder with its manifest, the files shared out over the ranks; the same finding on all of them."""
    if verify is not Verify.FULL or world.size == 1:
        return on_first_rank(partial(look_at, folder, verify), world)
    finding = on_first_rank(partial(open_manifest, folder), world)
    if finding.manifest is None:
        return finding
    on_every_rank(partial(wait_until_seen, folder, SEEN_WITHIN_S), world)
    files = finding.manifest.files
    largest_first = sorted(files, key=lambda name: files[name].bytes, reverse=True)
    share = largest_first[world.rank :: world.size]
    shares = of_all_ranks(problems_of(folder, finding.manifest, digests=True, only=share), world)
    return Finding(finding.manifest, tuple(dict.fromkeys(line for lines in shares for line in lines)))


def _asked_for(search: Search, world: Group) -> str:
    tag = on_first_rank(partial(find_tag, search.directory, search.iteration), world)
    finding = inspect(search.directory / tag, search.verify, world)
    if finding.bad:
        raise _refusal(search, tag, finding, world)
    on_first_rank(partial(_settle, search, tag, finding, {}), world)
    return tag


def _newest(search: Search, world: Group) -> str:
    tags, hint = on_first_rank(partial(_candidates, search.directory), world)
    bad: dict[str, Finding] = {}
    for tag in tags:
        finding = inspect(search.directory / tag, search.verify, world)
        if finding.bad:
            if not search.own:
                raise _refusal(search, tag, finding, world)
            on_first_rank(partial(_discard, search.directory / tag, finding), world)
            bad[tag] = finding
        elif finding.whole or tag == hint:
            on_first_rank(partial(_settle, search, tag, finding, bad), world)
            return tag
    if bad:
        raise _none_left(search.directory, bad, [tag for tag in tags if tag not in bad])
    tag = on_first_rank(partial(find_tag, search.directory), world)  # says what is missing
    raise CheckpointError(f"{tag} has just appeared", where=str(search.directory), fix="start again")


def _candidates(directory: Path) -> tuple[list[str], str | None]:
    """Folder names, newest step first, and what `latest` names. By number: a file's time says nothing after a copy or a clock set back."""
    tags, hint = [step_tag(step) for step in reversed(saved_steps(directory))], latest_tag(directory)
    if hint and step_of(hint) is None and holds(directory, hint):
        tags.insert(0, hint)  # a name of somebody's own choice
    return tags, hint


def _settle(search: Search, tag: str, finding: Finding, bad: Mapping[str, Finding]) -> None:
    """What follows from the choice, on the first rank."""
    hint = latest_tag(search.directory)
    if finding.manifest is None:
        lost = any((search.directory / step_tag(step) / MANIFEST).exists() for step in saved_steps(search.directory))
        tell, suspicion = (log.warning, ", though others beside it have one") if lost else (log.info, "")
        tell("%s has no %s%s, so it cannot be verified: it is taken as it is", search.directory / tag, MANIFEST, suspicion)
    if search.iteration is not None:
        if search.own and set_aside_after(search.directory, search.iteration):
            log.warning("remove `iteration: %d` for the next start, or it goes back there again", search.iteration)
        return
    if hint in bad:
        write_latest(search.directory, tag)
    elif hint is not None and hint != tag:
        newer = step_of(hint) is not None and (search.directory / hint).is_dir()
        fix = f"; to go back there: `iteration: {step_of(hint)}`" if newer else ", which is not there"
        log.warning("the newest whole checkpoint, %s, is taken, while `latest` names %s%s", tag, hint, fix)


def _discard(folder: Path, finding: Finding) -> None:
    place = set_aside(folder, CORRUPT)
    log.error("the checkpoint %s is damaged and set aside as %s:\n%s", folder, place.name, _listed(finding.problems))


def _refusal(search: Search, tag: str, finding: Finding, world: Group) -> CheckpointError:
    """The error for a bad step that may not be passed over in silence. Call on every rank."""
    fix = "copy it again"
    for other in on_first_rank(partial(_candidates, search.directory), world)[0]:
        step = step_of(other)
        if other != tag and step is not None and inspect(search.directory / other, search.verify, world).whole:
            fix += f", or take the newest one that is whole: `iteration: {step}`"
            break
    first = finding.problems[0].partition(":")[0]
    what = f"the checkpoint {tag} is damaged:\n{_listed(finding.problems)}"
    return CheckpointError(what, where=str(search.directory / tag / first), fix=fix)


def _none_left(directory: Path, bad: Mapping[str, Finding], unknown: Sequence[str]) -> CheckpointError:
    lines = [f"{tag}: {problem}" for tag, finding in bad.items() for problem in finding.problems]
    fix = "copy one of them again (they are set aside under names ending in .corrupt), or begin anew in an empty folder"
    if unknown:
        fix += f"; there also is {unknown[0]}, which has no {MANIFEST} and is taken when named: `iteration: {step_of(unknown[0])}`"
    return CheckpointError(f"every checkpoint is damaged:\n{_listed(lines)}", where=str(directory), fix=fix)


def _listed(lines: Sequence[str]) -> str:
    shown = [f"    {line}" for line in lines[:_MOST_LINES]]
    return "\n".join(shown + ([f"    and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []))
