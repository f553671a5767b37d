# SPDX-License-Identifier: Apache-2.0
"""How long a server asks to be left alone. Knows no request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


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
        return max((parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
