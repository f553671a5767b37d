# SPDX-License-Identifier: Apache-2.0
"""Requests to a Hub on this machine that is busy, refuses, or is switched off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.errors import CheckpointError, DataError
from megatron.hub.client import dataset_commit, snapshot
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
