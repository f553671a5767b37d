# SPDX-License-Identifier: Apache-2.0
"""`hf:<folder or hub id>[@revision]` -> a folder on this host's disk. Knows no content of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.atomic_io import digest_of, new_digest
from megatron.errors import CheckpointError
from megatron.hub.client import snapshot
from megatron.hub.retry import STARTING
from megatron.log import get_logger
from megatron.mpu.collectives import of_all_ranks, on_every_rank, on_first_rank
from megatron.mpu.groups import Group

log = get_logger(__name__)

PREFIX = "hf:"
FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_FIX = "write hf:<folder that a Hugging Face model was saved to>, or hf:<owner>/<name>[@revision] for a model of the hub"


@dataclass(frozen=True, kw_only=True)
class HFAddress:
    """What was written. name: a folder or a hub id; revision: a branch, tag or commit of the hub, None = its main branch."""

    name: str
    revision: str | None = None

    @property
    def local(self) -> bool:
        """Whether it names a folder that is there."""
        return Path(self.name).expanduser().is_dir()


@dataclass(frozen=True, kw_only=True)
class HFFolder:
    """A model's folder on this host, and which one exactly it is.

    address:  as it was written, with its prefix
    revision: the hub's commit; None for a folder of one's own
    digest:   of the names and the content of its weights and config.json (of names and sizes alone where no more was looked at)
    """

    address: str
    directory: Path
    revision: str | None = None
    digest: str = ""

    def told(self) -> dict[str, str | None]:
        """For a checkpoint to keep: where the run started from."""
        return {"load": self.address, "revision": self.revision, "digest": self.digest}


def is_hf(load: str | None) -> bool:
    """Whether a value of `load` names a Hugging Face model."""
    return bool(load) and str(load).startswith(PREFIX)


def parse(load: str) -> HFAddress:
    """What stands behind the prefix. Raises CheckpointError for what can be neither a folder nor a hub id.

    >>> parse("hf:EleutherAI/pythia-70m@step3000")
    HFAddress(name='EleutherAI/pythia-70m', revision='step3000')
    """
    text = load.removeprefix(PREFIX).strip()
    whole = HFAddress(name=text)
    if text and whole.local:
        return whole
    name, _, revision = text.partition("@")
    given = HFAddress(name=name, revision=revision or None)
    if name and given.local:
        raise CheckpointError(
            f"a folder has no revisions, and '{revision}' is asked for", where=f"load: {load}", fix=f"load: {PREFIX}{name}"
        )
    if not _ID.match(name):
        raise CheckpointError(f"there is no folder {name or '(nothing)'}", where=f"load: {load}", fix=_FIX)
    return given


def fetch(load: str, world: Group | None = None, *, contents: bool = True) -> HFFolder:
    """The folder that `load` names, the same model on every host. Call on every rank of `world`.

    A model of the hub is downloaded by one rank of each host, at the revision that the first one found.
    contents: the digest is of the files' contents, which the ranks share out, instead of names and sizes
    Raises CheckpointError, the same on every rank.
    """
    world = world or Group.single()
    # One rank decides: another host may not see the folder.
    address, local = on_first_rank(partial(_looked_up, load), world)
    if local:
        directory, revision = Path(address.name).expanduser().resolve(), None
        on_every_rank(partial(_require_folder, directory, load), world)
    else:
        revision = on_first_rank(lambda: _download(address, load).name, world)
        pinned = HFAddress(name=address.name, revision=revision)
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        on_every_rank(lambda: _download(pinned, load) if first_here and world.rank else None, world)
        directory = Path(on_every_rank(lambda: str(_download(pinned, load, offline=True)), world)[world.rank])
    return HFFolder(address=load, directory=directory, revision=revision, digest=digest(directory, world, contents=contents))


def _looked_up(load: str) -> tuple[HFAddress, bool]:
    address = parse(load)
    return address, address.local


def digest(directory: Path, world: Group, *, contents: bool) -> str:
    """One digest over the weights and config.json of a folder; the ranks share the reading."""
    kinds = ("*.safetensors", "pytorch_model*.bin", "config.json", "*.index.json")
    files = sorted(path for kind in kinds for path in directory.glob(kind))
    largest_first = sorted(files, key=lambda path: path.stat().st_size, reverse=True)
    mine = {path.name: digest_of(path).xxh128 for path in largest_first[world.rank :: world.size]} if contents else {}
    found: Mapping[str, str] = {name: value for share in of_all_ranks(mine, world) for name, value in share.items()}
    whole = new_digest()
    for path in files:
        whole.update(f"{path.name} {path.stat().st_size} {found.get(path.name, '')}\n".encode())
    kind = "xxh128" if contents else "sizes-xxh128"
    return f"{kind}:{whole.hexdigest()}"


def _require_folder(directory: Path, load: str) -> None:
    if not directory.is_dir():
        host = os.uname().nodename
        raise CheckpointError(
            f"{host} does not see the folder", where=f"load: {load}", fix="put the model on a file system that all hosts share"
        )


def _download(address: HFAddress, load: str, *, offline: bool = False) -> Path:
    """The hub's snapshot of a model on this host; files that are there already are not sent again."""
    if not offline:
        log.info("looking for %s on the Hugging Face hub%s", address.name, f" at {address.revision}" if address.revision else "")
    return snapshot(
        address.name,
        FILES,
        revision=address.revision,
        offline=offline,
        where=f"load: {load}",
        fix=_FIX,
        error_type=CheckpointError,
        patience=STARTING,
    )
