# SPDX-License-Identifier: Apache-2.0
"""Requests to a Hub on this machine that is busy, refuses, or is switched off; and the waits while it is busy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

from megatron.errors import CheckpointError, DataError
from megatron.hub.client import ask_hub, dataset_commit, is_limit, snapshot
from tests.support.hub_server import Fault, Hub, serve

NAME = "owner/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """One model and one dataset."""
    files = {("models", NAME): {"config.json": b"{}", "deep/config.json": b"{}"}, ("datasets", "owner/set"): {"a.jsonl": b"{}"}}
    with serve(Hub(files)) as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        # Where it was imported before, it has a copy of the template.
        template = "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(template, served.url + "/{repo_id}/resolve/{revision}/{filename}", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield served


def test_a_busy_hub_is_asked_again_after_the_time_it_names(hub: Hub, tmp_path: Path) -> None:
    hub.faults += [Fault("GET /api/models", 429, {"Retry-After": "3"}, 2), Fault("GET .*config.json", 429, {"Retry-After": "4"})]
    waits: list[float] = []
    folder = snapshot(NAME, ["*.json"], cache=tmp_path / "cache", sleep=waits.append)
    assert (folder / "config.json").read_bytes() == b"{}" and not (folder / "deep").exists()
    assert folder.name == hub.commit("models", NAME) and waits[:2] == [3, 3]


def test_what_is_not_there_is_named_with_its_fix(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder owner/none") as caught:
        snapshot("owner/none", ["*"], cache=tmp_path, error_type=CheckpointError, where="load: hf:owner/none")
    assert caught.value.where == "load: hf:owner/none" and "HF_TOKEN" in (caught.value.fix or "")


def test_offline_says_so_at_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    waits: list[float] = []
    with pytest.raises(DataError, match="HF_HUB_OFFLINE") as caught:
        snapshot(NAME, ["*"], cache=tmp_path, sleep=waits.append)
    assert "unset HF_HUB_OFFLINE" in (caught.value.fix or "") and not waits and not hub.log
    assert dataset_commit("owner/set", None) is None


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
    assert ask_hub(failing(errors), "it", sleep=waits.append) == 7  # type: ignore[arg-type]
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
        ask_hub(failing([HubError("HTTP 429")] * 20), "org/name", sleep=waits.append)  # type: ignore[arg-type]
    assert len(waits) == 9 and caught.value.where == "org/name"
    with pytest.raises(DataError, match="404") as caught:
        ask_hub(failing([HubError("404", Response(404))]), "it", sleep=waits.append)  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, HubError)
    assert len(waits) == 9


def test_a_busy_server_and_a_broken_connection_are_tried_again_soon() -> None:
    assert waits_for([HubError("x", Response(503, {"Retry-After": "7"})), HubError("x", Response(503))]) == [7, 2]
    assert waits_for([ConnectionResetError("gone")] * 2) == [1, 2]
    waits: list[float] = []
    with pytest.raises(DataError, match="ConnectionResetError"):
        ask_hub(failing([ConnectionResetError("gone")] * 9), "it", sleep=waits.append)  # type: ignore[arg-type]
    unknown = ConnectionError("no host")
    unknown.__cause__ = socket.gaierror(-2, "Name or service not known")
    with pytest.raises(DataError, match="no host"):
        ask_hub(failing([unknown]), "it", sleep=waits.append)  # type: ignore[arg-type]
    assert waits == [1, 2]
