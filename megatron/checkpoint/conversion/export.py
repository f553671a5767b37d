# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run as Hugging Face models, written while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.atomic_io import write_durably
from megatron.checkpoint.conversion.convert import planned, unpacked
from megatron.checkpoint.conversion.model import Described
from megatron.checkpoint.conversion.output_folder import ByteProgress, Table, dtype_name, written_aside
from megatron.checkpoint.conversion.tokenizer_files import save_tokenizer, write_generation_config
from megatron.checkpoint.conversion.weights import Whole
from megatron.checkpoint.formats.hf_files import CONFIG, SHARD_BYTES, write_json, write_shards
from megatron.checkpoint.loading.merge_tp import shapes_of
from megatron.checkpoint.mapping.families import FAMILIES, hf_config
from megatron.checkpoint.mapping.rows import Family, bound_rows, from_canonical
from megatron.checkpoint.steps.commit import EXPORTING, recover
from megatron.checkpoint.steps.step_dirs import step_of
from megatron.errors import ConfigError, NeoXError
from megatron.hub.background_queue import BackgroundQueue
from megatron.log import get_logger
from megatron.model.spec import ModelSpec

log = get_logger(__name__)

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the checkpoints of one run become Hugging Face folders.

    family: what the model is there
    keys:   our flat keys, resolved; spec: the model they describe
    dtype:  of the tensors written
    rows:   kept of the vocabulary; None = all, those that fill it up too
    fields: of config.json beyond the family's (ids of special tokens)
    tokenizer: a tokenizer.json, which goes along with what belongs to it
    """

    family: Family
    keys: Mapping[str, Any]
    spec: ModelSpec
    dtype: torch.dtype
    rows: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None

    def write(self, step: Path, out: Path) -> None:
        """Write the weights of the folder `step` as `out`, which gets its name when it is whole and on disk.

        Raises NeoXError or OSError; then `out` is as it was.
        """
        model = Described(self.keys, self.spec)
        config = hf_config(self.family, self.keys, self.spec, vocab_size=self.rows)
        config |= {"torch_dtype": dtype_name(self.dtype), **self.fields}
        weights = Whole(step, model)
        bound = list(bound_rows(self.family, self.spec, config["vocab_size"]))
        plan = planned(bound, model, weights.dtypes(), self.dtype)
        with written_aside(out, overwrite=True) as aside:
            table = Table(ByteProgress(f"exporting {step.name}", sum(one.bytes for one in plan)))
            write_shards(aside, plan, unpacked(bound, weights), table.add, limit=SHARD_BYTES)
            table.progress.close()
            if self.tokenizer is not None:
                save_tokenizer(self.tokenizer, aside)
            write_json(aside / CONFIG, config)
            write_generation_config(aside, config)


def tokenizer_file(kind: str, vocab_file: str | None) -> Path | None:
    """The tokenizer.json that `tokenizer_type` and `vocab_file` name; None for another kind of tokenizer."""
    if kind != "HFTokenizer" or not vocab_file:
        return None
    given = Path(vocab_file).expanduser()
    return given / TOKENIZER if given.is_dir() else given


def family_for(keys: Mapping[str, Any], spec: ModelSpec, preferred: str | None = None) -> Family:
    """The first architecture that can express a model. preferred: the class name of the one to try first

    Raises ConfigError, naming the keys that the nearest one cannot express.
    """
    if keys.get("train_impl") == "rm":
        fix = "leave out save_hf, and run tools/ckpts/convert_neox_to_hf.py with --pad-token-id"
        raise ConfigError("save_hf does not write reward models", where="save_hf", fix=fix)
    families = sorted(FAMILIES, key=lambda family: family.hf != preferred)
    refusals = [(family, refused(family, keys, spec)) for family in families]
    for family, errors in refusals:
        if not errors:
            return family
    nearest, errors = min(refusals, key=lambda one: len(one[1]))
    lines = [f"    {error.what}" for error in errors]
    raise ConfigError(
        f"save_hf: no Hugging Face architecture known here can be this model; {nearest.hf} comes nearest, but:\n" + "\n".join(lines),
        where=", ".join(dict.fromkeys(error.where for error in errors if error.where)) or "save_hf",
        fix="change these keys, or leave out save_hf",
    )


def refused(family: Family, keys: Mapping[str, Any], spec: ModelSpec) -> Sequence[NeoXError]:
    """Why a family cannot express a model, field by field, else tensor by tensor; nothing where it can."""
    errors: list[NeoXError] = []
    for row in family.config:
        try:
            row.to_hf(keys, spec)
        except ConfigError as error:
            errors.append(error)
    if errors:
        return errors
    try:
        from_canonical(family, dict.fromkeys(shapes_of(spec), torch.empty(0)), spec)
    except NeoXError as error:
        return [error]
    return []


FOLDER = "hf"
"""Beside the checkpoints; in it a folder for each exported one, under the same name."""

PROGRESS_S = 15.0


class Exporter:
    """Exports published checkpoints of one run, in a thread of its own. The markers are its queue.

    directory: `save`
    every:     checkpoints whose step is a multiple of it; 1 = all
    failures:  exports that were given up so far: they keep no checkpoint from being deleted
    """

    def __init__(self, directory: Path, export: Export, *, every: int = 1) -> None:
        self.directory = directory
        self.export = export
        self.every = every
        self.failures = 0
        self._queue = BackgroundQueue("export", self._left, self._attempt)

    def start(self) -> None:
        """Begin; what an earlier start left is taken up."""
        for line in recover(self.directory / FOLDER):
            log.warning("%s: %s", self.directory / FOLDER, line)
        self._queue.start()

    def published(self, folder: Path) -> None:
        """A checkpoint has got its name; returns at once."""
        step = step_of(folder.name)
        if step is None or step % self.every:
            return
        try:
            marker = self.directory / EXPORTING / folder.name
            marker.parent.mkdir(exist_ok=True)
            write_durably(marker, "")
        except OSError as error:  # a full disk, say: the checkpoint is there, and training goes on
            self._failed(folder.name, error)
            return
        self._queue.wake()

    def drain(self, *, hurried: Callable[[], bool] = lambda: False, early_s: float = 0.0) -> bool:
        """Wait until everything is exported; returns whether it is. The thread has ended, or ends with the process.

        hurried: whether the process was told to end; then it waits no longer than early_s from there
        """
        if self._queue.busy:
            log.info("waiting for the export of %s", ", ".join(self._left()) or "nothing")
        done = self._queue.drain(hurried=hurried, early_s=early_s, report=self._report, report_s=PROGRESS_S)
        if not done:
            log.error("not exported yet: %s; the next start of this run does it", ", ".join(self._left()))
        return done

    def stop(self) -> None:
        """Begin no further one."""
        self._queue.stop()

    def _report(self) -> None:
        log.info("  still exporting %s", ", ".join(self._left()))

    def _left(self) -> list[str]:
        place = self.directory / EXPORTING
        names = [entry.name for entry in place.iterdir()] if place.is_dir() else []
        return sorted((name for name in names if step_of(name) is not None), key=lambda name: step_of(name) or 0)

    def _attempt(self, tag: str) -> None:
        step, marker = self.directory / tag, self.directory / EXPORTING / tag
        try:
            if step.is_dir():
                out, began = self.directory / FOLDER / tag, time.monotonic()
                out.parent.mkdir(exist_ok=True)
                self.export.write(step, out)
                log.info("  exported %s as %s in %.1f s", out, self.export.family.hf, time.monotonic() - began)
            else:
                log.warning("%s was deleted before it was exported", step)
        except Exception as error:  # whatever fails here must not end a training run
            self._failed(tag, error)
        with suppress(OSError):
            marker.unlink(missing_ok=True)

    def _failed(self, tag: str, error: Exception) -> None:
        self.failures += 1
        log.error("%s was not exported, and stays as it is: %s", tag, error)
