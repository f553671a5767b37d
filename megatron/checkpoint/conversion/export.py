# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run as Hugging Face models, written while it goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.conversion.convert import write_hf
from megatron.checkpoint.conversion.model import Described, Precision, ToHF
from megatron.checkpoint.conversion.output_folder import add_tokenizer, dtype_name
from megatron.checkpoint.conversion.weights import Whole
from megatron.checkpoint.loading.merge_tp import shapes_of
from megatron.checkpoint.mapping.families import FAMILIES, expressed
from megatron.checkpoint.mapping.rows import Family, from_canonical
from megatron.checkpoint.steps.step_dirs import EXPORTING, recover, step_of
from megatron.checkpoint.steps.upload import PublishedQueue
from megatron.errors import ConfigError, NeoXError
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
        precision = Precision.of(dtype_name(self.dtype))
        request = ToHF(source=step, out=out, precision=precision, vocab_size=self.rows, fields=self.fields, overwrite=True)
        add = partial(add_tokenizer, vocab_file=self.tokenizer, special=self.fields)
        model = Described(self.keys, self.spec)
        write_hf(Whole(step, model), model, self.family, request, title=f"exporting {step.name}", finish=[add])


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
    if refusals := expressed(family, keys, spec)[1]:
        return [error for _, error in refusals]
    try:
        from_canonical(family, dict.fromkeys(shapes_of(spec), torch.empty(0)), spec)
    except NeoXError as error:
        return [error]
    return []


FOLDER = "hf"
"""Beside the checkpoints; in it a folder for each exported one, under the same name."""


class Exporter(PublishedQueue):
    """Exports published checkpoints of one run. One that failed is given up: it keeps no checkpoint from being deleted.

    directory: `save`
    every:     checkpoints whose step is a multiple of it; 1 = all
    """

    def __init__(self, directory: Path, export: Export, *, every: int = 1) -> None:
        undone, failed = "exported yet: %s; the next start of this run does it", "%s was not exported, and stays as it is: %s"
        super().__init__(directory, EXPORTING, waiting="the export of %s", undone=undone, failed=failed)
        self.export = export
        self.every = every

    def start(self) -> None:
        """Begin; what an earlier start left is taken up."""
        for line in recover(self.directory / FOLDER):
            log.warning("%s: %s", self.directory / FOLDER, line)
        super().start()

    def published(self, folder: Path) -> None:
        """A checkpoint has got its name; returns at once."""
        step = step_of(folder.name)
        if step is not None and step % self.every == 0:
            super().published(folder)

    def _report(self) -> None:
        log.info("  still exporting %s", ", ".join(self.marked()))

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
