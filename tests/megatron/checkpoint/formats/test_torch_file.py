# SPDX-License-Identifier: Apache-2.0
"""Reading torch files: nothing found in a file runs."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import CheckpointError


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_never_runs(tmp_path: Path, zipped: bool) -> None:
    """A file that would run a function is refused, by name, and the function has not run."""
    import torch

    from megatron.checkpoint.formats.torch_file import read_torch_file

    path, target = tmp_path / "weights.pt", tmp_path / "made_by_the_pickle"
    torch.save({"module": Hostile(str(target))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"not plain data.*mkdir|damaged"):
        read_torch_file(path)
    assert not target.exists()


def test_tensors_and_random_states_are_read(tmp_path: Path) -> None:
    """What a checkpoint holds comes back equal."""
    import torch

    from megatron.checkpoint.formats.torch_file import read_torch_file
    from megatron.checkpoint.loading.resume_state import capture_rng, restore_rng

    numbers = {"lr": np.float64(1e-3), "steps": np.int64(7), "done": np.bool_(True)}
    state = {"weight": torch.arange(6.0).reshape(2, 3), **numbers, **capture_rng()}
    expected = torch.rand(4)
    torch.save(state, tmp_path / "state.pt")
    read = read_torch_file(tmp_path / "state.pt")
    assert torch.equal(read["weight"], state["weight"]) and {name: read[name] for name in numbers} == numbers
    restore_rng(read, tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    """Truncated and absent files are errors that name the file."""
    import torch

    from megatron.checkpoint.formats.torch_file import read_torch_file

    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    for bad in (path, tmp_path / "absent.pt"):
        with pytest.raises(CheckpointError) as caught:
            read_torch_file(bad)
        assert caught.value.where == str(bad)
        assert caught.value.fix


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_is_damaged_is_one_error(tmp_path: Path, zipped: bool) -> None:
    """Three hundred times, up to four bytes of the pickle are others: the file is read, or refused by name."""
    import torch

    from megatron.checkpoint.formats.torch_file import read_torch_file
    from megatron.checkpoint.loading.resume_state import capture_rng

    whole, path, chance = tmp_path / "whole.pt", tmp_path / "damaged.pt", random.Random(0)
    state = {"weight": torch.arange(6.0), "lr": np.float64(1), "args": {"a": [1, (2, 3)]}}
    torch.save({**state, **(capture_rng() if zipped else {})}, whole, _use_new_zipfile_serialization=zipped)
    refused = 0
    for _ in range(300):
        if zipped:
            with zipfile.ZipFile(whole) as parts, zipfile.ZipFile(path, "w") as written:
                for name in parts.namelist():
                    content = parts.read(name)
                    written.writestr(name, damaged(content, chance) if name.endswith("data.pkl") else content)
        else:
            path.write_bytes(damaged(whole.read_bytes(), chance))
        try:
            read_torch_file(path)
        except CheckpointError as error:
            assert error.where == str(path)
            refused += 1
    assert refused > 100


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with up to four other bytes near its beginning."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(min(len(changed), 3000))] = chance.randrange(256)
    return bytes(changed)
