# SPDX-License-Identifier: Apache-2.0
"""What a manifest says, and what it finds."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from megatron import atomic_io
from megatron.atomic_io import digest_of, write_durably
from megatron.checkpoint.steps.manifest import MANIFEST, Entry, problems_of, read_manifest, write_manifest
from megatron.errors import CheckpointError
from support.checkpoints import KINDS, flip, manifest_of, step_folder


def test_written_and_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = step_folder(tmp_path, 5, manifest=False)
    assert read_manifest(folder) is None
    manifest = dataclasses.replace(manifest_of(folder), samples=20, tokens=1280)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest and (folder / MANIFEST).read_text().isascii()
    assert problems_of(folder, manifest, digests=True) == []
    (folder / "note.txt").write_text("mine")
    with caplog.at_level(logging.DEBUG):
        assert problems_of(folder, manifest, digests=True) == []
    assert "note.txt" in caplog.text


def test_the_digest_is_that_of_xxh128sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "CHUNK_BYTES", 2)
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_of(tmp_path / "file") == Entry(3, "06b05ab6733a618578af5f94892f3950")


def test_only_some_files_are_looked_at(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 5)
    manifest = read_manifest(folder)
    assert manifest is not None
    for name in manifest.files:
        flip(folder / name)
    assert problems_of(folder, manifest, digests=False) == []
    assert len(problems_of(folder, manifest, digests=True)) == len(manifest.files) == 5
    assert problems_of(folder, manifest, digests=True, only=[KINDS["weights"]]) == [f"{KINDS['weights']}: content differs (xxh128)"]


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b'{"format": 1}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"the manifest is damaged\n.*{MANIFEST}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/file"])
def test_no_file_outside_of_the_folder_is_named(tmp_path: Path, name: str) -> None:
    folder = step_folder(tmp_path, 5, manifest=False)
    write_manifest(folder, dataclasses.replace(manifest_of(folder), files={name: Entry(1, "")}))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        read_manifest(folder)


def test_a_newer_format_is_told_apart_from_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = step_folder(tmp_path, 5, manifest=False)
    monkeypatch.setattr("megatron.checkpoint.steps.manifest.FORMAT", 2)
    write_manifest(folder, manifest_of(folder))
    monkeypatch.undo()
    assert json.loads((folder / MANIFEST).read_text())["format"] == 2
    with pytest.raises(CheckpointError, match="newer format"):
        read_manifest(folder)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "latest", "global_step1")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(tmp_path / "latest", b"global_step2")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"] and (tmp_path / "latest").read_text() == "global_step1"
