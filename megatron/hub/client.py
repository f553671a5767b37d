# SPDX-License-Identifier: Apache-2.0
"""Every request to the Hugging Face Hub, with one set of errors: what is missing or refused, where, and how to fix it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron.errors import CheckpointError, DataError, NeoXError
from megatron.hub.retry import PREPARING, Patience, Sleep, retry_busy, status_of
from megatron.secrets import redact

T = TypeVar("T")
LOGIN = "log in (`hf auth login`, or HF_TOKEN)"
DATASET_FIX = "check name, subset, split and revision; a local path is read without the network"


def ask_hub(
    action: Callable[[], T],
    name: str,
    *,
    where: str | None = None,
    fix: str = "check the name and the revision",
    error_type: type[NeoXError] = DataError,
    patience: Patience = PREPARING,
    sleep: Sleep = time.sleep,
) -> T:
    """The result of a request to the Hub about `name`, tried again while the Hub is busy.

    where: what the user wrote; fix: what helps if there is no such thing
    Raises `error_type`: whatever `datasets`, huggingface_hub and what they read with raise.
    """
    try:
        return retry_busy(action, name, patience=patience, sleep=sleep, error_type=error_type)
    except NeoXError:
        raise
    except Exception as error:
        what, help_ = _explained(error, name, fix)
        raise error_type(what, where=where or name, fix=help_) from error


def dataset_commit(name: str, revision: str | None, *, sleep: Sleep = time.sleep) -> str | None:
    """The commit of a dataset's repository at a revision; None when offline. Raises DataError where there is none."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    return ask_hub(lambda: HfApi().dataset_info(name, revision=revision).sha, name, fix=DATASET_FIX, sleep=sleep)


def snapshot(name: str, patterns: Sequence[str], *, revision: str | None = None, offline: bool = False, **asked: Any) -> Path:
    """A folder with the files of a model whose names match `patterns`, downloaded where they are not in the cache. Folders are left out.

    offline: only from the cache
    asked:   `cache` (another folder than HF_HOME's) and `folders` (take files in folders too), then those of `ask_hub`
    """
    from huggingface_hub import snapshot_download

    cache, folders = asked.pop("cache", None), asked.pop("folders", False)
    folder = ask_hub(
        lambda: snapshot_download(
            name,
            revision=revision,
            cache_dir=cache,
            allow_patterns=list(patterns),
            ignore_patterns=None if folders else ["*/*"],
            local_files_only=offline,
        ),
        name if revision is None else f"{name}@{revision}",
        **asked,
    )
    return Path(folder)


def upload_folder(folder: Path, repository: str) -> str:
    """Put a model's folder into a repository of the Hub, which is made where there is none; returns its address.

    Raises CheckpointError where the Hub refuses.
    """
    from huggingface_hub import HfApi

    def upload() -> str:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
        return str(address)

    return ask_hub(upload, repository, fix="log in with a token that may write", error_type=CheckpointError)


def _explained(error: Exception, name: str, fix: str) -> tuple[str, str]:
    """What is wrong and how to fix it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    download = f"when offline, download it where there is a network (`hf download {name.partition('@')[0]}`)"
    by_hand = f"{download} and share HF_HOME, or copy it and give its folder"
    if isinstance(error, GatedRepoError):
        return f"the owner of {name} asks for consent first", f"accept its terms on its page at huggingface.co, and {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"there is no such revision: {name}", "give a branch, tag or commit of it"
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return f"there is neither a folder {name} nor anything of this name on the Hub", f"{fix}; for a private one {LOGIN}"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)) and constants.HF_HUB_OFFLINE:
        off = f"there is no folder {name}, and nothing of this name in the Hub's cache, with the Hub switched off (HF_HUB_OFFLINE)"
        return off, f"unset HF_HUB_OFFLINE, or {by_hand}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"there is no folder {name}, nothing of this name in the Hub's cache, and no way to the Hub", by_hand
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]
    status = status_of(error)
    help_ = f"{fix}; private and gated ones need HF_TOKEN" if status in (401, 403, 404) else fix
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}", help_
