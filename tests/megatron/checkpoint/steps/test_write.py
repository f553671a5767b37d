# SPDX-License-Identifier: Apache-2.0
"""Files written in threads: their content and digest, what a copy protects from, and errors that are kept."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron import fault_injection
from megatron.atomic_io import CHUNK_BYTES, Entry, digest_of
from megatron.checkpoint.formats.torch_file import host_copy
from megatron.checkpoint.steps.write import RankFileWriter, write_torch_file

BIG = CHUNK_BYTES // 2  # float32 entries: two pieces


def some_state() -> dict[str, Any]:
    shared = torch.arange(3 * BIG, dtype=torch.float32)
    return {
        "views": [shared[:BIG], shared[BIG:].view(2, BIG).t()],
        "small": {"a": torch.ones(3, dtype=torch.bfloat16), "b": (torch.tensor(7), "text", None)},
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "learned": torch.ones(4, requires_grad=True),
        "numbers": [1, 2.5],
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert (type(found), found.dtype, found.requires_grad) == (type(expected), expected.dtype, expected.requires_grad)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_a_file_is_what_torch_reads_and_its_digest_says(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pt", some_state()
    entry = write_torch_file(state, path)
    assert entry == digest_of(path)
    assert_same(torch.load(path, weights_only=True), state)
    # Memory that is shared is written once.
    assert entry.bytes < 3 * BIG * 4 + 20_000


def test_a_copy_gives_the_same_file_and_is_left_alone(tmp_path: Path) -> None:
    state = some_state()
    first = write_torch_file(state, tmp_path / "a.pt")
    copied = host_copy(state, whole=True)
    for tensor in (*state["views"], state["small"]["a"], state["parameter"].data, state["learned"].data):
        tensor.zero_()
    state["numbers"].append(3)
    assert write_torch_file(copied, tmp_path / "b.pt") == first
    assert write_torch_file(state, tmp_path / "c.pt") != first


def test_without_need_nothing_is_copied() -> None:
    state = some_state()
    assert host_copy(state, whole=False) is state


@pytest.mark.parametrize("copies", [False, True])
def test_files_of_one_checkpoint(tmp_path: Path, copies: bool) -> None:
    writing, states = RankFileWriter(tmp_path, copies=copies), {f"{number}.pt": {"x": torch.full((1000,), number)} for number in range(7)}
    for name, state in states.items():
        writing.add(state, tmp_path / name)
    written = writing.wait()
    assert writing.done and not writing.failed and not written.problems and written.seconds > 0
    assert written.files == {name: digest_of(tmp_path / name) for name in states}


def test_errors_are_kept_with_file_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = RankFileWriter(tmp_path)
    writing.add({"x": 1}, tmp_path / "good.pt")
    writing.add({"x": 1}, tmp_path / "absent" / "bad.pt")
    writing.add({"x": threading.Lock()}, tmp_path / "unwritable.pt")
    writing.fail("folder", PermissionError(13, "Permission denied"))
    assert writing.failed
    written = writing.wait()
    assert list(written.files) == ["good.pt"]
    assert written.problems[:2] == ("folder: Permission denied", "absent/bad.pt: No such file or directory")
    assert written.problems[2].startswith("unwritable.pt: cannot pickle") and len(written.problems) == 3

    monkeypatch.setattr(fault_injection, "point", lambda site: 1 / 0)
    writing = RankFileWriter(tmp_path)
    writing.add({"x": 1}, tmp_path / "raising.pt")
    assert writing.wait().problems == ("raising.pt: division by zero",)


def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path) -> None:
    """A limit on file sizes stands in for it; torch goes on writing behind the first error unless it is kept from it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK_BYTES, 2 * CHUNK_BYTES))
    writing = RankFileWriter(tmp_path)
    writing.add({"x": torch.ones(2 * BIG), "y": torch.ones(BIG)}, tmp_path / "large.pt")
    writing.add({"x": torch.ones(10)}, tmp_path / "small.pt")
    written = writing.wait()
    assert written.problems == ("large.pt: File too large",) and list(written.files) == ["small.pt"]


def test_what_is_abandoned_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(site: str) -> None:
        begun.set()
        go_on.wait(20)

    monkeypatch.setattr(fault_injection, "point", slow)
    writing = RankFileWriter(tmp_path, copies=True)
    for name in ("a.pt", "b.pt", "c.pt"):
        writing.add({"x": torch.ones(BIG)}, tmp_path / name)
    assert begun.wait(20) and not writing.done and not writing.failed
    writing.abandon()
    go_on.set()
    written = writing.wait()
    assert written.problems == ("another rank's files failed first",) and written.files == {}


def test_states_that_are_not_copied_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a rank that writes a hundred files does not hold a hundred states."""
    together, most = [0], [0]
    original = RankFileWriter._write

    def counted(self: RankFileWriter, state: Any, path: Path) -> Entry:
        together[0] += 1
        most[0] = max(most[0], together[0])
        entry = original(self, state, path)
        together[0] -= 1
        return entry

    monkeypatch.setattr(RankFileWriter, "_write", counted)
    writing, held = RankFileWriter(tmp_path, threads=2), []
    for number in range(12):
        writing.add({"x": torch.ones(BIG)}, tmp_path / f"{number}.pt")
        held.append(sum(not job.done() for job in writing._files.values()))
    assert not writing.wait().problems and most[0] <= 2 and max(held) <= 3
