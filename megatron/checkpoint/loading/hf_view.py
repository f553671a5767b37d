# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model to start from: `hf:<folder or hub id>[@revision]` becomes a folder on disk, and that folder one of our models."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron.atomic_io import digest_of, new_digest
from megatron.checkpoint.formats.hf_files import CONFIG, read_config, read_state
from megatron.checkpoint.formats.torch_file import LazyState
from megatron.checkpoint.mapping.config_rows import Fixed
from megatron.checkpoint.mapping.families import FAMILIES, expressed, family_of, neox_keys
from megatron.checkpoint.mapping.rows import Family, to_canonical
from megatron.errors import CheckpointError, ConfigError
from megatron.hub.client import STARTING, snapshot
from megatron.log import get_logger
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import of_all_ranks, on_every_rank, on_first_rank
from megatron.mpu.groups import Group

log = get_logger(__name__)

PREFIX = "hf:"
FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_FIX = "write hf:<folder that a Hugging Face model was saved to>, or hf:<owner>/<name>[@revision] for a model of the hub"


@dataclass(frozen=True, kw_only=True)
class HFAddress:
    """What was written. name: a hub id, or (local) a folder that is there; revision: a branch, tag or commit, None = the main branch."""

    name: str
    revision: str | None = None
    local: bool = False


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
    HFAddress(name='EleutherAI/pythia-70m', revision='step3000', local=False)
    """
    text = load.removeprefix(PREFIX).strip()
    name, _, revision = text.partition("@")
    if text and Path(text).expanduser().is_dir():
        return HFAddress(name=text, local=True)
    if name and Path(name).expanduser().is_dir():
        what = f"a folder has no revisions, and '{revision}' is asked for"
        raise CheckpointError(what, where=f"load: {load}", fix=f"load: {PREFIX}{name}")
    if not _ID.match(name):
        raise CheckpointError(f"there is no folder {name or '(nothing)'}", where=f"load: {load}", fix=_FIX)
    return HFAddress(name=name, revision=revision or None)


def fetch(load: str, world: Group | None = None, *, contents: bool = True) -> HFFolder:
    """The folder that `load` names, the same model on every host. Call on every rank of `world`.

    A model of the hub is downloaded by one rank of each host, at the revision that the first one found.
    contents: the digest is of the files' contents, which the ranks share out, instead of names and sizes
    Raises CheckpointError, the same on every rank.
    """
    world = world or Group.single()
    # One rank decides: another host may not see the folder.
    address = on_first_rank(partial(parse, load), world)
    if address.local:
        directory, revision = Path(address.name).expanduser().resolve(), None
        on_every_rank(partial(_require_folder, directory, load), world)
    else:
        revision = on_first_rank(lambda: _download(address, load).name, world)
        pinned = HFAddress(name=address.name, revision=revision)
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        on_every_rank(lambda: _download(pinned, load) if first_here and world.rank else None, world)
        directory = Path(on_every_rank(lambda: str(_download(pinned, load, offline=True)), world)[world.rank])
    return HFFolder(address=load, directory=directory, revision=revision, digest=digest(directory, world, contents=contents))


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
        what = f"{host} does not see the folder"
        raise CheckpointError(what, where=f"load: {load}", fix="put the model on a file system that all hosts share")


def _download(address: HFAddress, load: str, *, offline: bool = False) -> Path:
    """The hub's snapshot of a model on this host; files that are there already are not sent again."""
    if not offline:
        log.info("looking for %s on the Hugging Face hub%s", address.name, f" at {address.revision}" if address.revision else "")
    told: dict[str, Any] = {"where": f"load: {load}", "fix": _FIX, "error_type": CheckpointError}
    return snapshot(address.name, FILES, revision=address.revision, offline=offline, patience=STARTING, **told)


FREE = frozenset({"seq_length", "hidden_dropout", "attention_dropout", "intermediate_size_convention"})
"""Keys that a training run may choose: the weights are the same model."""

ROWS = "padded_vocab_size"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """A folder, its config.json, and the family whose rows read it."""

    directory: Path
    config: Mapping[str, Any]
    family: Family

    @classmethod
    def open(cls, directory: Path) -> HFModel:
        """Raises CheckpointError for a folder without a config, ConfigError for an architecture that no family reads."""
        config = read_config(directory)
        try:
            return cls(directory=directory, config=config, family=family_of(config))
        except ConfigError as error:
            known = ", ".join(family.hf for family in FAMILIES)
            raise ConfigError(error.what, where=str(directory / CONFIG), fix=f"these can be read: {known}") from error

    @property
    def keys(self) -> dict[str, Any]:
        """Our flat keys for it. Raises ConfigError for what our model cannot be."""
        return neox_keys(self.family, self.config)

    def facts(self) -> dict[str, Any]:
        """For a checkpoint to keep, so that an export is of the same kind: architecture, vocabulary, ids of special tokens."""
        ids = {name: self.config[name] for name in TOKEN_IDS if name in self.config}
        return {"architecture": self.family.hf, "vocab_size": self.keys[ROWS], "token_ids": ids}

    def weights(self, spec: ModelSpec, *, empty: bool = False) -> LazyState:
        """All weights under our names, whole, made on access. Raises CheckpointError where files or names are missing.

        empty: shapes alone, as tensors without numbers
        """
        return to_canonical(self.family, read_state(self.directory, empty=empty), spec)

    def require_same(self, keys: Mapping[str, Any], spec: ModelSpec) -> None:
        """Raise ConfigError, naming every difference, unless the configuration describes this model.

        keys: the run's flat keys, resolved; spec: the model they describe
        """
        lines = differences(self.family, self.config, keys, spec)
        if lines:
            what = f"the configuration does not describe the model in {self.directory}:\n" + "\n".join(f"    {line}" for line in lines)
            fix = f"change these keys, or take all of the model's: python tools/ckpts/hf_config.py {self.directory}"
            raise ConfigError(what, where=str(self.directory / CONFIG), fix=fix)


def differences(family: Family, config: Mapping[str, Any], keys: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """What our configuration says otherwise than a Hugging Face config, one line each.

    Both are brought to the family's own form of our keys, so that two ways of writing the same thing are no difference.
    """
    lines: list[str] = []
    family = replace(family, config=tuple(row for row in family.config if getattr(row, "neox", None) not in FREE))
    fields, refusals = expressed(family, keys, spec)
    for row, error in refusals:
        if isinstance(row, Fixed):
            lines.append(_line(row.neox, keys.get(row.neox), row.value))
        else:
            lines.append(f"{error.where}: {error.what}; {error.fix}")
    refused = [row for row, _ in refusals]
    family = replace(family, config=tuple(row for row in family.config if row not in refused))
    ours, theirs = _complete(neox_keys(family, fields)), _complete(neox_keys(family, config))
    ours[ROWS] = spec.vocab_size
    # Without a table of positions, their limit is no part of the weights.
    free = FREE if spec.embedding.max_positions else FREE | {"max_position_embeddings"}
    for key in dict.fromkeys((*theirs, *ours)):
        if key in free or (key == ROWS and ours[key] >= theirs.get(key, 0)):
            continue
        here, there = ours.get(key), theirs.get(key)
        if here != there:
            lines.append(_line(key, here, there))
    return lines


def _line(key: str, here: Any, there: Any) -> str:
    return f"{key}: {_shown(here)} here, {_shown(there)} in the model; set {key}: {'at least ' if key == ROWS else ''}{_shown(there)}"


def _complete(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys that follow from others where they are absent."""
    whole = dict(keys)
    if whole.get("num_kv_heads") is None and "num_attention_heads" in whole:
        whole["num_kv_heads"] = whole["num_attention_heads"]
    if whole.get("intermediate_size") is None and "hidden_size" in whole:
        whole["intermediate_size"] = 4 * whole["hidden_size"]
    return whole


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def ready_yaml(model: HFModel, load: str) -> str:
    """Text of a configuration file that describes a model and starts from it."""
    keys: dict[str, Any] = {"load": load}
    if (model.directory / "tokenizer.json").is_file():
        keys |= {"tokenizer_type": "HFTokenizer", "vocab_file": str(model.directory)}
    stored = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32").removeprefix("torch.")
    keys |= {"precision": PRECISIONS.get(stored, "fp32"), **model.keys}
    title = f"# {model.family.hf}: what its config.json says, in the keys of this project.\n"
    return title + yaml.safe_dump(keys, sort_keys=False, width=120)


PRECISIONS = {"bfloat16": "bfloat16", "float16": "fp16", "float32": "fp32"}
"""dtype of a Hugging Face config -> our `precision`."""
