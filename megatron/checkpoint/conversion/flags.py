# SPDX-License-Identifier: Apache-2.0
"""What the conversion scripts have in common: flags, and models named by a folder or a hub id."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError
from megatron.hub.client import snapshot
from megatron.log import get_logger
from megatron.tool_flags import ToolParser

log = get_logger(__name__)

SHARED = """
  --overwrite        replace the output folder, where there is one
  --verify           compare the logits of source and result, of the whole model whatever its size; without this flag,
                     those of a few layers where there are more than 2 billion parameters
  --no-verify        do not"""


def parser(usage: str) -> argparse.ArgumentParser:
    """With the shared flags."""
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=usage)
    flags.add_argument("--overwrite", action="store_true")
    flags.add_argument("--verify", action=argparse.BooleanOptionalAction, default=None)
    return flags


def shared(given: argparse.Namespace) -> dict[str, Any]:
    """Their values, as a request takes them."""
    return {"overwrite": given.overwrite, "verify": given.verify}


WORDS = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
OLD_WEIGHTS = ("pytorch_model*.bin",)


def local_folder(model: str, revision: str | None = None, cache: str | None = None, *, weights: bool = True) -> Path:
    """`model` itself where it is a folder, else a snapshot of that id (at a revision), downloaded.

    weights: they, too, and not only config and tokenizer
    Raises CheckpointError where neither is to be had.
    """
    if Path(model).is_dir():
        if revision is not None:
            log.warning("%s is a folder: the revision %s says nothing of it", model, revision)
        return Path(model)
    fix = "correct the name or the revision, log in, or download the model and give its folder"
    fetch = partial(snapshot, model, revision=revision, cache=cache, folders=True, fix=fix, error_type=CheckpointError)
    folder = fetch([*WORDS, *(WEIGHTS if weights else ())])
    if weights and not any(folder.glob("*.safetensors")):
        folder = fetch([*WORDS, *OLD_WEIGHTS])
    return folder
