# SPDX-License-Identifier: Apache-2.0
"""The manifest of a step's folder: every file with size and digest, and whether the folder still is what it says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.atomic_io import Entry, digest_of, write_durably
from megatron.errors import CheckpointError
from megatron.log import get_logger

log = get_logger(__name__)

__all__ = ["MANIFEST", "Entry", "Manifest", "problems_of", "read_manifest", "write_manifest"]

MANIFEST = "MANIFEST.json"
FORMAT = 1
_THREADS = 4
_FIX = "copy the checkpoint again, or choose another step with `iteration`"
# Also of a folder that waits under a name like global_step10.partial.
_STEP = re.compile(r"^global_step(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete step folder is.

    files:   name relative to the folder, with slashes -> what the file holds; the manifest itself is not among them
    samples, tokens: consumed so far, over all data ranks
    layout:  pipe, tensor, context, data, zero_stage, precision, pipelined: how the files are spread over ranks
    config:  the run's resolved flat configuration, without secrets
    data:    fingerprint of the training data
    written: when, for people: nothing is ordered by time
    origin:  the Hugging Face model whose weights the run began with; empty for another beginning
    """

    step: int
    run_id: str = ""
    files: Mapping[str, Entry] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    layout: Mapping[str, int | str | bool] = field(default_factory=dict)
    code_version: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    written: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into `folder`, on disk when this returns."""
    body = {one.name: getattr(manifest, one.name) for one in fields(manifest)}
    body["files"] = {name: asdict(entry) for name, entry in manifest.files.items()}
    write_durably(folder / MANIFEST, _render({"format": FORMAT, **body}))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`; None when it has none.

    Raises CheckpointError, naming the file, when it is damaged or of a newer format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"the manifest cannot be read: {error}", where=str(path), fix=_FIX) from error
    try:
        content = json.loads(text)
        body = {key: value for key, value in content.items() if key != _DIGEST}
        # The whole text, not the digest alone: nothing in the file is without a check.
        damaged = _render(body).encode() != text
    except (ValueError, AttributeError, RecursionError):
        damaged = True
    if damaged:
        raise CheckpointError("the manifest is damaged", where=str(path), fix=_FIX)
    if body.pop("format", None) != FORMAT:
        raise CheckpointError("the manifest is of a newer format", where=str(path), fix="use the version that wrote it, or a newer one")
    try:
        files = {_inside(name): Entry(**entry) for name, entry in body.pop("files").items()}
        origin = body.get("origin", {})  # manifests of older versions have none
        named = {one.name: body[one.name] for one in fields(Manifest) if one.name not in ("files", "origin")}
        return Manifest(files=files, origin=origin, **named)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the manifest lacks what it must hold: {error}", where=str(path), fix=_FIX) from error


def problems_of(folder: Path, manifest: Manifest, *, digests: bool, only: Collection[str] | None = None) -> list[str]:
    """What is wrong with a folder, one line per bad file; nothing where it is whole.

    digests: also read every file; otherwise names and sizes are compared
    only:    look at these files alone, as several ranks do that share the work
    """
    found = []
    match = _STEP.match(folder.name)
    if match is not None and int(match.group(1)) != manifest.step:
        found.append(f"{MANIFEST}: is of step {manifest.step}, the folder of step {match.group(1)}")
    names = [name for name in manifest.files if only is None or name in only]
    # Hashing leaves Python's lock to others.
    with ThreadPoolExecutor(_THREADS if digests else 1) as pool:
        problems = pool.map(lambda name: _problem(folder / name, manifest.files[name], manifest.files, digests), names)
        found += [f"{name}: {problem}" for name, problem in zip(names, problems, strict=True) if problem is not None]
    if only is None and (extra := sorted(_names(folder) - set(manifest.files) - {MANIFEST})):
        log.debug("%s holds files that its manifest does not know: %s", folder, ", ".join(extra))
    return found


def _problem(path: Path, entry: Entry, files: Mapping[str, Entry], digests: bool) -> str | None:
    try:
        size = path.stat().st_size
        if not digests and size == entry.bytes:
            return None
        actual = digest_of(path) if digests else Entry(size, "")
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if actual == entry:
        return None
    whose = next((name for name, other in files.items() if other == actual), None)
    if whose is not None:
        return f"holds the content of {whose}"
    if actual.bytes != entry.bytes:
        return f"{actual.bytes} bytes, manifest says {entry.bytes}"
    return "content differs (xxh128)"


def files_in(folder: Path) -> dict[str, Entry]:
    """What every file in a folder holds, by name relative to it."""
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} is outside of the folder")
    return name


_DIGEST = "sha256_of_the_above"


def _render(body: Mapping[str, Any]) -> str:
    """The text of a manifest, whose last line is a digest of the rest."""
    digest = hashlib.sha256(json.dumps(body, default=_plain).encode()).hexdigest()
    return json.dumps({**body, _DIGEST: digest}, indent=1, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


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
