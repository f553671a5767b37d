# SPDX-License-Identifier: Apache-2.0
"""A run whose folder is another's by now ends at the step boundary."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.errors import TrainingError
from megatron.hooks.base import TrainState, Verdict
from megatron.hooks.checkpointing import LockHook


def test_it_ends_the_run() -> None:
    nothing: Any = None
    assert LockHook(lambda: None).after_step(TrainState(), nothing, nothing) is Verdict.CONTINUE

    def lost() -> None:
        raise TrainingError("another run took over the folder")

    with pytest.raises(TrainingError, match="took over"):
        LockHook(lost).after_step(TrainState(), nothing, nothing)
