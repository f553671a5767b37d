# SPDX-License-Identifier: Apache-2.0
"""Copies of checkpoints in a local S3 server: whole, verified, gone on with after an interruption, never in the training's way."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from megatron.errors import BackendError, CheckpointError, ConfigError
from support.s3 import BUCKET, Store, s3_server

MIB = 2**20
PART = 5 * MIB


@pytest.fixture
def store() -> Iterator[Store]:
    with s3_server() as found:
        yield found


def checkpoint(save: Path, step: int, **files: bytes) -> Path:
    """A step's folder with its manifest, and `latest`."""
    from megatron.checkpoint.steps.manifest import Entry, Manifest, write_manifest

    folder = save / f"global_step{step}"
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, content in ({"mp_rank_00_model_states.pt": b"weights %d" % step, "configs/a.yml": b"seed: 1"} | files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        entries[name] = Entry(len(content), xxh3_128_hexdigest(content))
    empty: dict[str, Any] = {"layout": {}, "config": {}, "data": {}}
    numbers: dict[str, Any] = {"samples": 0, "tokens": 0}
    write_manifest(folder, Manifest(step=step, run_id="r", files=entries, code_version="", written="", **empty, **numbers))
    (save / "latest").write_text(folder.name)
    return folder


def uploader(store: Store, save: Path) -> Any:
    from megatron.checkpoint.steps.upload import Uploader
    from megatron.hub.s3 import Address, open_client

    return Uploader(save, store.watched(open_client()), Address(BUCKET, "runs/run"), part_bytes=PART)


def uploaded(store: Store, save: Path, *folders: Path) -> Any:
    """Start, publish, and wait for the end."""
    made = uploader(store, save)
    made.start()
    for folder in folders:
        made.published(folder)
    made.done = made.drain(patience_s=30)
    return made


def expected(*folders: Path) -> dict[str, bytes]:
    files = {
        f"runs/run/{folder.name}/{p.relative_to(folder)}": p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()
    }
    return files | {"runs/run/latest": (folders[-1].parent / "latest").read_bytes()}


def markers(save: Path) -> list[str]:
    from megatron.checkpoint.steps.upload import marked

    return marked(save)


def test_a_checkpoint_arrives_whole_with_its_manifest_last(store: Store, tmp_path: Path) -> None:
    """Every byte, large files in parts; nothing after the manifest but `latest`; a second start sends nothing."""
    big = os.urandom(2 * PART + 17)
    folder = checkpoint(tmp_path, 10, **{"layer_00-model_00-model_states.pt": big, "empty.pt": b""})
    first = uploaded(store, tmp_path, folder)
    assert first.done and first.failures == 0 and not markers(tmp_path)
    assert store.objects() == expected(folder)
    assert [key.rpartition("/")[2] for _, key in store.asked[-2:]] == ["MANIFEST.json", "latest"]
    assert sum(request == "UploadPart" for request, _ in store.asked) == 3
    head = store.client.head_object(Bucket=BUCKET, Key=f"runs/run/{folder.name}/layer_00-model_00-model_states.pt")
    assert head["Metadata"]["xxh128"] == xxh3_128_hexdigest(big)
    store.asked.clear()
    assert uploaded(store, tmp_path).done
    assert [key for _, key in store.asked] == ["runs/run/latest"]


def test_what_was_sent_before_an_interruption_is_not_sent_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is stopped at the third part: the marker stays, and the next start sends the two parts that lack."""
    from megatron import fault_injection

    content = os.urandom(4 * PART)
    folder = checkpoint(tmp_path, 10, **{"mp_rank_00_model_states.pt": content})
    first = uploader(store, tmp_path)

    def stop_at_the_third(site: str) -> None:
        if len(store.asked) > 3:
            first.stop()

    monkeypatch.setattr(fault_injection, "point", stop_at_the_third)
    first.start()
    first.published(folder)
    assert not first.drain(patience_s=30) and markers(tmp_path) == ["global_step10"]
    sent = sum(request == "UploadPart" for request, _ in store.asked)
    assert 0 < sent < 4 and "runs/run/global_step10/MANIFEST.json" not in store.objects()
    first._thread.join(30)
    monkeypatch.undo()
    store.asked.clear()
    assert uploaded(store, tmp_path).done
    assert sum(request == "UploadPart" for request, _ in store.asked) == 4 - sent
    assert not any(request == "CreateMultipartUpload" for request, _ in store.asked)
    assert store.objects() == expected(folder)


def test_an_unfinished_upload_of_other_content_is_replaced(store: Store, tmp_path: Path) -> None:
    """Parts of an earlier save of the same step are there: the object is nevertheless that of the new one, digest included."""
    key = "runs/run/global_step10/mp_rank_00_model_states.pt"
    old = store.client.create_multipart_upload(Bucket=BUCKET, Key=key, Metadata={"xxh128": "old"})["UploadId"]
    store.client.upload_part(Bucket=BUCKET, Key=key, UploadId=old, PartNumber=1, Body=bytes(PART))
    folder = checkpoint(tmp_path, 10, **{"mp_rank_00_model_states.pt": os.urandom(PART + 9)})
    assert uploaded(store, tmp_path).done
    assert store.objects() == expected(folder)
    assert not store.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


@pytest.mark.parametrize(
    "forged",
    [pytest.param(False, id="overwritten", marks=pytest.mark.full), pytest.param(True, id="with the right digest beside it")],
)
def test_a_damaged_object_is_replaced(store: Store, tmp_path: Path, forged: bool) -> None:
    """An object of the right size that holds something else is sent again; the others are not."""

    content = os.urandom(PART + 5)
    folder = checkpoint(tmp_path, 10, **{"mp_rank_00_model_states.pt": content})
    assert uploaded(store, tmp_path).done
    key = "runs/run/global_step10/mp_rank_00_model_states.pt"
    beside = {"Metadata": {"xxh128": xxh3_128_hexdigest(content)}, "ChecksumAlgorithm": "SHA256"} if forged else {}
    store.client.put_object(Bucket=BUCKET, Key=key, Body=content[:-1] + bytes([content[-1] ^ 1]), **beside)
    store.asked.clear()
    uploader(store, tmp_path).mark(folder.name)
    assert uploaded(store, tmp_path).done
    assert store.objects() == expected(folder)
    assert {name for _, name in store.asked} == {key, "runs/run/latest"}


def test_a_file_that_changed_on_disk_is_not_uploaded(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A failure that is told and counted; nothing claims that the checkpoint is there. It is tried again with the next one."""
    bad = checkpoint(tmp_path, 10, **{"mp_rank_00_model_states.pt": os.urandom(PART + 5)})
    whole = (bad / "mp_rank_00_model_states.pt").read_bytes()
    (bad / "mp_rank_00_model_states.pt").write_bytes(whole[:-1] + b"?")
    made = uploader(store, tmp_path)
    made.start()
    made.published(bad)
    assert not made._idle.is_set() and made._idle.wait(30)
    assert made.failures >= 1 and "not what its manifest says" in caplog.text
    assert not {"runs/run/latest", "runs/run/global_step10/MANIFEST.json"} & set(store.objects())
    (bad / "mp_rank_00_model_states.pt").write_bytes(whole)
    good = checkpoint(tmp_path, 20)
    made.published(good)
    assert made.drain(patience_s=30)
    assert store.objects() == expected(bad, good)


def test_a_step_saved_again_replaces_the_copy(store: Store, tmp_path: Path) -> None:
    """And `latest` follows a run that was set back to an earlier step, but no late upload of an older or an abandoned one."""

    def latest_after(*names: str) -> bytes:
        for name in names:
            uploader(store, tmp_path)._point_latest(name)
        return store.objects()["runs/run/latest"]

    first, later = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    assert uploaded(store, tmp_path, later).done
    assert latest_after("global_step10") == b"global_step20"
    back = checkpoint(tmp_path, 10, **{"mp_rank_00_model_states.pt": b"other weights"})
    assert back == first
    assert uploaded(store, tmp_path, back).done
    assert store.objects() == expected(later, back) and latest_after("global_step20") == b"global_step10"
    checkpoint(tmp_path, 12)
    assert latest_after("global_step11") == b"global_step11"


def test_retention_waits_for_the_upload(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is published stays until its copy is whole, whatever keep_last_n_checkpoints says."""
    from megatron import fault_injection
    from megatron.checkpoint.steps.step_dirs import prune

    go_on = threading.Event()
    monkeypatch.setattr(fault_injection, "point", lambda site: go_on.wait(60))
    made = uploader(store, tmp_path)
    made.start()
    for step in (10, 20):
        made.published(checkpoint(tmp_path, step))
    assert prune(tmp_path, keep=1, protected=()) == []
    go_on.set()
    assert made.drain(patience_s=30)
    assert prune(tmp_path, keep=1, protected=()) == [10]
    assert "runs/run/global_step10/MANIFEST.json" in store.objects()


def test_an_outage_is_counted_and_waits_for_the_next_start(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Publishing returns at once, nothing is raised, no credential is told."""
    from megatron.hub import s3

    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    folder = checkpoint(tmp_path, 10)
    reachable = os.environ["AWS_ENDPOINT_URL_S3"]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:canary-secret@127.0.0.1:9")
    made = uploader(store, tmp_path)
    made.place.check()
    made.start()
    began = time.monotonic()
    made.published(folder)
    assert time.monotonic() - began < 1
    assert not made.drain(patience_s=30) and made.failures >= 1
    assert "upload of global_step10" in caplog.text and "not uploaded yet: global_step10" in caplog.text
    assert "canary" not in caplog.text
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", reachable)
    assert uploaded(store, tmp_path).done and store.objects() == expected(folder)


def test_a_marker_that_cannot_be_written_ends_nothing(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither at the start nor when a checkpoint is published."""
    folder = checkpoint(tmp_path, 10)
    (tmp_path / ".uploading").write_text("in the way")
    made = uploaded(store, tmp_path, folder)
    assert made.failures == 2 and "upload of global_step10" in caplog.text


def test_drain_gives_up_when_nothing_moves(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With lines that say how far it is."""
    from megatron import fault_injection
    from megatron.checkpoint.steps import upload

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(upload, "PROGRESS_S", 0.3)
    monkeypatch.setattr(fault_injection, "point", lambda site: time.sleep(60))
    folder = checkpoint(tmp_path, 10)
    made = uploader(store, tmp_path)
    made.start()
    made.published(folder)
    began = time.monotonic()
    assert not made.drain(patience_s=1)
    assert time.monotonic() - began < 20
    assert "uploading global_step10: 0.0 of 0.0 MiB" in caplog.text
    assert made.drain(patience_s=60, hurried=lambda: True, early_s=0.2) is False


def test_what_is_missing_is_said_at_the_start(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, the credentials, the bucket: each is one error that says how to fix it."""
    import sys

    from megatron.hub.s3 import Address, S3Prefix, open_client

    with pytest.raises(ConfigError, match="there is no such bucket") as caught:
        S3Prefix(client=open_client(), address=Address("absent"), part_bytes=PART).check()
    assert caught.value.where == "s3_path" and caught.value.fix
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no credentials"):
        open_client()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        open_client()
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(BackendError, match="boto3") as missing:
        open_client()
    assert "--extra s3" in str(missing.value.fix)


def test_a_store_that_drops_what_it_gets_is_noticed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every object is asked for again after it was sent."""
    from megatron.checkpoint.steps.manifest import Entry
    from megatron.hub.s3 import Address, S3Prefix, open_client

    client = open_client()
    monkeypatch.setattr(client, "put_object", lambda **request: {})
    (tmp_path / "a").write_bytes(b"content")
    entry = Entry(7, xxh3_128_hexdigest(b"content"))
    with pytest.raises(CheckpointError, match="does not hold what it was sent"):
        S3Prefix(client=client, address=Address(BUCKET), part_bytes=PART).send(tmp_path / "a", "a", entry)
