# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all, with the mode that the umask gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.atomic_io import atomic_path, atomic_write


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "x.json"
    before = os.umask(0o027)
    try:
        with atomic_write(path, durable=durable) as file:
            file.write("\u00e9")
            assert not path.exists() and [other.name.startswith("x.json.tmp.") for other in tmp_path.iterdir()] == [True]
    finally:
        os.umask(before)
    assert path.read_bytes() == "\u00e9".encode() and path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ValueError, match="half way"), atomic_write(path, "wb", durable=durable) as file:
        file.write(b"new")
        raise ValueError("half way")
    assert path.read_bytes() == "\u00e9".encode() and list(tmp_path.iterdir()) == [path]


def test_a_library_gets_a_name_with_the_ending_it_wants(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x.json", suffix=".json") as aside:
        assert aside.name.endswith(".json")
        aside.write_text("1")
    assert (tmp_path / "x.json").read_text() == "1"
