# SPDX-License-Identifier: Apache-2.0
"""A model named by folder or by its id on the Hugging Face hub, as a folder; and a folder put there. Knows no ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron.errors import CheckpointError
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    fix = "correct the name or the revision, log in, or download the model and give its folder"
    try:
        fetch = partial(snapshot_download, model, revision=revision, cache_dir=cache)
        folder = Path(fetch(allow_patterns=[*WORDS, *(WEIGHTS if weights else ())]))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(fetch(allow_patterns=[*WORDS, *OLD_WEIGHTS]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"no such folder, and the hub does not give it: {reason}", where=model, fix=fix) from error


def upload(folder: Path, repository: str) -> str:
    """Put a model's folder into a repository of the hub, which is made where there is none; returns its address.

    Raises CheckpointError where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the hub does not take it: {reason}", where=repository, fix="log in with a token that may write") from error
    return str(address)
