# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any layout goes on at any other, optimizer included: the same bits on load, the same losses and samples after it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed
from support.respread import LAYOUTS, changes

pytestmark = pytest.mark.dist

PAIRS = list(permutations(LAYOUTS, 2))
SOME = [("whole", "tensor"), ("tensor", "zero3"), ("zero3", "pipeline"), ("pipeline", "zero1"), ("zero2", "tensor"), ("zero1", "whole")]


def judge(found: list[Any], states: set[str], loss: float = 1e-6) -> None:
    """Nothing was lost or changed on the way."""
    for pair, seen in found[0].items():
        assert seen["names"] == [] and seen["unequal"] == [], pair
        assert set(seen["states"]) == {"", *states}, pair
        assert seen["rows"], pair
        assert seen["loss"] <= loss, (pair, seen["loss"])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("pairs", [SOME, pytest.param(PAIRS, marks=pytest.mark.full)], ids=["some", "all"])
def test_every_layout_goes_on_at_every_other(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """A model with biases in shares, in float32."""
    found = run_distributed(changes, 2, 380, init=False, folder=str(tmp_path), layouts=LAYOUTS, pairs=pairs, style="neox")
    assert set(found[0]) == set(pairs)
    judge(found, {"exp_avg", "exp_avg_sq"})
