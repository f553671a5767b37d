# SPDX-License-Identifier: Apache-2.0
"""Every request to the Hugging Face Hub, with one set of errors: what is missing or refused, where, and how to fix it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from socket import gaierror
from typing import Any, TypeVar

import tenacity

from megatron.errors import CheckpointError, DataError, NeoXError
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)
T = TypeVar("T")
Sleep = Callable[[float], None]
TOO_MANY, UNAVAILABLE = HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE
_LIMITED = re.compile(r"(?<![\w.])429(?![\w.])")


@dataclass(frozen=True)
class Patience:
    """How often something is tried, and the wait after the first try; each later wait is twice as long, up to the longest.

    Waits that a server asks for take their place, up to `longest_asked_s`. A connection that fails is tried `connection_tries` times.
    """

    tries: int = 10
    first_s: float = 300.0
    longest_s: float = 600.0
    longest_asked_s: float = 3600.0
    connection_tries: int = 3
    connection_first_s: float = 1.0

    def wait_s(self, attempt: int, error: BaseException) -> float:
        """Seconds after try number `attempt`, which ended with `error`."""
        if (asked := asked_by(error)) is not None:
            return min(asked, self.longest_asked_s)
        first = self.first_s if is_limit(error) else self.connection_first_s
        return min(first * 2.0 ** (attempt - 1), self.longest_s)

    def exhausted(self, attempt: int, error: BaseException) -> bool:
        """Whether try number `attempt` was the last."""
        return attempt >= (self.tries if is_busy(error) else self.connection_tries)


PREPARING = Patience()
"""Before a run, when nobody waits but a person's patience."""

STARTING = Patience(tries=5, first_s=5.0, longest_s=60.0, longest_asked_s=120.0)
"""At the start of a run, when other ranks wait and will not wait for ever."""


def may_pass(error: BaseException) -> bool:
    """Whether a later try may go better."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = list(_causes(error))
    if is_busy(error):
        return True
    if any(isinstance(one, (OfflineModeIsEnabled, gaierror)) or "Name or service not known" in str(one) for one in causes):
        return False
    return status_of(error) is None and any(_is_connection(one) for one in causes)


def is_limit(error: BaseException) -> bool:
    """Whether the error, or one that led to it, is HTTP 429."""
    return any(_status(one) == TOO_MANY or (_status(one) is None and _LIMITED.search(str(one))) for one in _causes(error))


def is_busy(error: BaseException) -> bool:
    """Whether the server has too much to do: HTTP 429 or 503."""
    return is_limit(error) or status_of(error) == UNAVAILABLE


def status_of(error: BaseException) -> int | None:
    """HTTP status of the answer that led to an error; None = there was none."""
    return next((status for one in _causes(error) if (status := _status(one)) is not None), None)


def asked_by(error: BaseException) -> float | None:
    """Seconds that the server's answer asks for; None = nothing."""
    answers = [getattr(one, "response", None) for one in _causes(error)]
    asked = [asked_wait(answer.headers) for answer in answers if answer is not None and answer.headers]
    return next((seconds for seconds in asked if seconds is not None), None)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers of an answer ask for: `Retry-After` (seconds or a date), or `RateLimit: "api";r=0;t=55`; None = nothing.

    >>> asked_wait({"Retry-After": "12"}), asked_wait({"RateLimit": '"api";r=0;t=55'}), asked_wait({})
    (12.0, 55.0, None)
    """
    said = {name.lower(): value for name, value in headers.items()}
    if "retry-after" in said:
        return _seconds(said["retry-after"])
    match = re.search(r";\s*t=(\d+)", said.get("ratelimit", ""))
    return float(match[1]) if match else None


def _seconds(after: str) -> float | None:
    if after.strip().isdigit():
        return float(after)
    try:
        return max((parsedate_to_datetime(after) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> Any:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_connection(error: BaseException) -> bool:
    """Those of the standard library, and those of requests (huggingface-hub 0) and httpx (1 and later), by their names."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(names & {"TransportError", "RequestException"})


def _reason(error: BaseException) -> str:
    if is_limit(error):
        return "too many requests (HTTP 429)"
    return "the server is busy (HTTP 503)" if status_of(error) == UNAVAILABLE else f"no connection ({type(error).__name__})"


def _failure(state: tenacity.RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    return error if error is not None else RuntimeError("no error")


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
    """The result of a request to the Hub about `name`, tried again while the Hub is busy or cannot be reached.

    where: what the user wrote; fix: what helps if there is no such thing
    Raises `error_type`: whatever `datasets`, huggingface_hub and what they read with raise.
    """

    def told(state: tenacity.RetryCallState) -> None:
        seconds = state.next_action.sleep if state.next_action else 0.0
        log.warning("%s: %s, try %d; the next in %.0f s", name, _reason(_failure(state)), state.attempt_number, seconds)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=lambda state: patience.wait_s(state.attempt_number, _failure(state)),
        stop=lambda state: patience.exhausted(state.attempt_number, _failure(state)),
        before_sleep=told,
        sleep=sleep,
        reraise=True,
    )
    try:
        return retrying(action)
    except NeoXError:
        raise
    except Exception as error:
        if is_busy(error):
            what, help_ = f"{_reason(error)}, {patience.tries} times", "run this again later; with HF_TOKEN the limits are wider"
            raise error_type(what, where=name, fix=help_) from error
        what, help_ = _explained(error, name, fix)
        raise error_type(what, where=where or name, fix=help_) from error


def dataset_commit(name: str, revision: str | None, *, sleep: Sleep = time.sleep) -> str | None:
    """The commit of a dataset's repository at a revision; None when offline. Raises DataError where there is none."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    return ask_hub(lambda: HfApi().dataset_info(name, revision=revision).sha, name, fix=DATASET_FIX, sleep=sleep)


def snapshot(
    name: str, patterns: Sequence[str], *, revision: str | None = None, offline: bool = False, cache: str | None = None, **asked: Any
) -> Path:
    """A folder with the files of a model whose names match `patterns`, downloaded where they are not in the cache. Folders are left out.

    offline: only from the cache; cache: another folder than HF_HOME's
    asked:   `folders` (take files in folders too), then those of `ask_hub`
    """
    from huggingface_hub import snapshot_download

    ignored = None if asked.pop("folders", False) else ["*/*"]
    load = partial(snapshot_download, name, revision=revision, cache_dir=cache, local_files_only=offline)
    action = partial(load, allow_patterns=list(patterns), ignore_patterns=ignored)
    return Path(ask_hub(action, name if revision is None else f"{name}@{revision}", **asked))


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
    from huggingface_hub import constants, errors

    download = f"when offline, download it where there is a network (`hf download {name.partition('@')[0]}`)"
    by_hand = f"{download} and share HF_HOME, or copy it and give its folder"
    if isinstance(error, errors.GatedRepoError):
        return f"the owner of {name} asks for consent first", f"accept its terms on its page at huggingface.co, and {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no such revision: {name}", "give a branch, tag or commit of it"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return f"there is neither a folder {name} nor anything of this name on the Hub", f"{fix}; for a private one {LOGIN}"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) and constants.HF_HUB_OFFLINE:
        off = f"there is no folder {name}, and nothing of this name in the Hub's cache, with the Hub switched off (HF_HUB_OFFLINE)"
        return off, f"unset HF_HUB_OFFLINE, or {by_hand}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"there is no folder {name}, nothing of this name in the Hub's cache, and no way to the Hub", by_hand
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]
    status = status_of(error)
    help_ = f"{fix}; private and gated ones need HF_TOKEN" if status in (401, 403, 404) else fix
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}", help_
