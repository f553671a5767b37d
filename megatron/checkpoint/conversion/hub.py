# SPDX-License-Identifier: Apache-2.0
"""A model named by folder or by its id on the Hugging Face hub, as a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron.errors import CheckpointError
from megatron.hub.client import snapshot
from megatron.log import get_logger

log = get_logger(__name__)

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
