# SPDX-License-Identifier: Apache-2.0
"""Timers add up, and are silent when nobody asked."""

from __future__ import annotations

import doctest

from megatron.engine import micro_batches
from megatron.engine.micro_batches import Timers


def test_timers() -> None:
    assert doctest.testmod(micro_batches).failed == 0
    off = Timers(clock=lambda: 1 / 0)
    with off("forward"):
        pass
    assert list(off.over("batch generator", iter([1, 2]))) == [1, 2] and off.take() == {}
