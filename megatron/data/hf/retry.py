# SPDX-License-Identifier: Apache-2.0
"""Waiting when a server says that there were too many requests (HTTP 429). Knows no library and no request."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")
TRIES = 10
FIRST_WAIT_S = 300.0
LONGEST_WAIT_S = 600.0
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LIMITED = re.compile(r"(?<![\w.])429(?![\w.])")


def patiently(action: Callable[[], T], what: str, *, wait: Callable[[float], None] = time.sleep) -> T:
    """The action's result; it is tried again, TRIES times in all, as long as it fails with HTTP 429. Other errors are raised at once.

    Before try k + 1 it waits as long as the server says, else min(300 * 2^(k-1), 600) s. Raises DataError after the last try.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except Exception as error:
            if not is_limit(error):
                raise
            if attempt == TRIES:
                raise DataError(
                    f"too many requests (HTTP 429), {TRIES} times",
                    where=what,
                    fix="run this again later; with HF_TOKEN the limits are wider",
                ) from error
            seconds = _hint(error)
            seconds = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) if seconds is None else seconds
            log.warning("%s: too many requests (HTTP 429), try %d of %d; the next in %.0f s", what, attempt, TRIES, seconds)
            wait(seconds)
    raise AssertionError("unreachable")


def is_limit(error: BaseException) -> bool:
    """Whether the error, or one that led to it, is HTTP 429."""
    return any(_status(one) == 429 or (_status(one) is None and _LIMITED.search(str(one))) for one in _led_to(error))


def hidden(text: str) -> str:
    """The text without the user's Hub token."""
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, f"${name}")
    return text


def _led_to(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> Any:
    return getattr(getattr(error, "response", None), "status_code", None)


def _hint(error: BaseException) -> float | None:
    answers = [getattr(one, "response", None) for one in _led_to(error)]
    hints = [asked_wait(answer.headers) for answer in answers if answer is not None and answer.headers]
    return next((hint for hint in hints if hint is not None), None)


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
