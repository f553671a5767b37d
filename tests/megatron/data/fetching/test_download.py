# SPDX-License-Identifier: Apache-2.0
"""Downloads, from file URLs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron.data.fetching.download import Remote, fetch
from megatron.errors import DataError


def test_a_file_arrives_once_and_whole(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    remote = Remote(origin.as_uri(), "copy", size_bytes=7, sha256=sha256)
    assert fetch(remote, tmp_path / "raw").read_bytes() == b"content"
    origin.write_bytes(b"changed")
    assert fetch(remote, tmp_path / "raw").read_bytes() == b"content"
    with pytest.raises(DataError, match="the checksum is"):
        fetch(remote, tmp_path / "raw", again=True)
    origin.write_bytes(b"longer content")
    with pytest.raises(DataError, match="14 bytes arrived instead of 7"):
        fetch(remote, tmp_path / "raw", again=True)
    origin.unlink()
    with pytest.raises(DataError, match="the download failed") as caught:
        fetch(remote, tmp_path / "other")
    assert str(tmp_path / "other" / "copy") in (caught.value.mend or "")
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["copy"] and not list((tmp_path / "other").iterdir())
