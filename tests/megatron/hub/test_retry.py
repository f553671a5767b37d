# SPDX-License-Identifier: Apache-2.0
"""Waiting for a server that has had too many requests."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from megatron.errors import DataError
from megatron.hub.client import is_limit, retry_busy


@dataclass
class Response:
    status_code: int
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    def __init__(self, text: str, response: Response | None = None) -> None:
        super().__init__(text)
        self.response = response


def failing(errors: list[Exception]) -> object:
    """Raises the errors one call each, then gives 7."""

    def action() -> int:
        if errors:
            raise errors.pop(0)
        return 7

    return action


def waits_for(errors: list[Exception]) -> list[float]:
    waits: list[float] = []
    assert retry_busy(failing(errors), "it", sleep=waits.append) == 7  # type: ignore[arg-type]
    return waits


def test_waits_grow_as_documented_and_the_server_may_say_otherwise() -> None:
    assert waits_for([HubError("429 Client Error: Too Many Requests")] * 4) == [300, 600, 600, 600]
    assert waits_for([HubError("slow down", Response(429))] * 2) == [300, 600]
    assert waits_for([HubError("x", Response(429, {"Retry-After": "12"}))]) == [12]
    assert waits_for([HubError("x", Response(429, {"RateLimit": '"api";r=0;t=55'}))]) == [55]
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), usegmt=True)
    assert 90 < waits_for([HubError("x", Response(429, {"Retry-After": date}))])[0] <= 100
    assert waits_for([HubError("x", Response(429, {"Retry-After": "soon"}))]) == [300]


def test_what_led_to_an_error_is_looked_at() -> None:
    outer = ValueError("the dataset cannot be loaded")
    outer.__cause__ = HubError("x", Response(429, {"Retry-After": "3"}))
    assert waits_for([outer]) == [3]
    assert not is_limit(HubError("row 429 is bad", Response(404)))
    assert not is_limit(ValueError("1429 rows")) and not is_limit(ValueError("file-4.429.json"))


def test_it_gives_up_after_ten_tries_and_at_once_for_other_errors() -> None:
    waits: list[float] = []
    with pytest.raises(DataError, match="10 times") as caught:
        retry_busy(failing([HubError("HTTP 429")] * 20), "org/name", sleep=waits.append)  # type: ignore[arg-type]
    assert len(waits) == 9 and caught.value.where == "org/name"
    with pytest.raises(HubError, match="404"):
        retry_busy(failing([HubError("404", Response(404))]), "it", sleep=waits.append)  # type: ignore[arg-type]
    assert len(waits) == 9


def test_a_busy_server_and_a_broken_connection_are_tried_again_soon() -> None:
    assert waits_for([HubError("x", Response(503, {"Retry-After": "7"})), HubError("x", Response(503))]) == [7, 2]
    assert waits_for([ConnectionResetError("gone")] * 2) == [1, 2]
    waits: list[float] = []
    with pytest.raises(ConnectionResetError):
        retry_busy(failing([ConnectionResetError("gone")] * 9), "it", sleep=waits.append)  # type: ignore[arg-type]
    unknown = ConnectionError("no host")
    unknown.__cause__ = socket.gaierror(-2, "Name or service not known")
    with pytest.raises(ConnectionError):
        retry_busy(failing([unknown]), "it", sleep=waits.append)  # type: ignore[arg-type]
    assert waits == [1, 2]
