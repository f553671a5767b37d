# SPDX-License-Identifier: Apache-2.0
"""Whether a step's folder is what its manifest says, in one process. Knows no ranks and opens no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron.checkpoint.steps.manifest import MANIFEST, Manifest, problems_of, read_manifest
from megatron.checkpoint.steps.step_dirs import saved_steps, step_of, step_tag
from megatron.errors import CheckpointError


class Verify(Enum):
    """How closely a folder is compared with its manifest; the values of `checkpoint_verify`."""

    FULL = "full"  # the content of every file
    SIZE = "size"  # names and sizes
    OFF = "off"


@dataclass(frozen=True)
class Finding:
    """What a look at a folder gave.

    manifest: None where there is none that could be read
    problems: one line per bad file
    """

    manifest: Manifest | None
    problems: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        """Something differs from the manifest, or the manifest is damaged itself."""
        return bool(self.problems)

    @property
    def whole(self) -> bool:
        """All is as the manifest says."""
        return self.manifest is not None and not self.problems


def open_manifest(folder: Path) -> Finding:
    """The folder's manifest, with nothing else looked at."""
    try:
        return Finding(read_manifest(folder))
    except CheckpointError as error:
        return Finding(None, (f"{MANIFEST}: {error.what}",))


def look_at(folder: Path, verify: Verify) -> Finding:
    """Compare a folder with its manifest."""
    finding = open_manifest(folder)
    if finding.manifest is None or verify is Verify.OFF:
        return finding
    return Finding(finding.manifest, tuple(problems_of(folder, finding.manifest, digests=verify is Verify.FULL)))


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
