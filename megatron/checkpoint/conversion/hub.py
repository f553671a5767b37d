# SPDX-License-Identifier: Apache-2.0
"""A model named by folder or by its id on the Hugging Face hub, as a folder. The one file that downloads."""

from __future__ import annotations

from pathlib import Path

from megatron.errors import CheckpointError
from megatron.log import get_logger

log = get_logger(__name__)

PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")


def local_folder(model: str, revision: str | None = None, cache: str | None = None) -> Path:
    """`model` itself where it is a folder, else a snapshot of that id (at a revision), downloaded.

    Raises CheckpointError where neither is to be had.
    """
    if Path(model).is_dir():
        if revision is not None:
            log.warning("%s is a folder: the revision %s says nothing of it", model, revision)
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    mend = "correct the name or the revision, log in, or download the model and give its folder"
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"no such folder, and the hub does not give it: {reason}", where=model, mend=mend) from error
