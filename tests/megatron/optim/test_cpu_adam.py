# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's CPU Adam: refusals, locks, and (compiled) parity with torch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron.errors import BackendError, ConfigError
from megatron.optim.cpu_adam import await_lock, compile_operator, cpu_adam


def builder(**changes: Any) -> Any:
    def load(verbose: bool) -> None:
        raise RuntimeError("cc1plus was killed")

    given = {"name": "cpu_adam", "is_compatible": lambda verbose: True, "error_log": "no AVX2", "load": load}
    return SimpleNamespace(**{**given, **changes})


def test_what_cannot_be_compiled_is_an_error_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(BackendError, match="no AVX2.*\n(.*\n)?.*cpu_torch_adam"):
        compile_operator(builder(is_compatible=lambda verbose: False))
    with pytest.raises(BackendError, match="cc1plus was killed"):
        compile_operator(builder())
    with pytest.raises(ConfigError, match="no amsgrad"):
        cpu_adam([{"params": [nn.Parameter(torch.zeros(2))]}], {"lr": 0.1, "amsgrad": True})


def test_a_lock_left_behind_is_removed_and_a_fresh_one_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    await_lock(lock)  # none
    lock.touch()
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    await_lock(lock)
    assert not lock.exists()
    lock.touch()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), lock.unlink()))
    await_lock(lock)
    assert slept == [0.5], "a fresh lock is another program at work"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_compiled_it_equals_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a compile that was killed and left its lock."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    (folder / "lock").touch()
    os.utime(folder / "lock", (0, 0))
    start = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = cpu_adam([{"params": [mine], "weight_decay": 0.1}], {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8})
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for seed in range(5):
        mine.grad = torch.randn(33, 7, generator=torch.Generator().manual_seed(seed))
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
