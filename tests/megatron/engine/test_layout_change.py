# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any layout goes on at any other, optimizer included: the same bits on load, the same losses and samples after it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed
from support.reshard import LAYOUTS, changes

pytestmark = [pytest.mark.dist, pytest.mark.timeout(500)]

PAIRS = list(permutations(LAYOUTS, 2))
SOME = [("whole", "tensor"), ("tensor", "zero3"), ("zero3", "pipeline"), ("pipeline", "zero1"), ("zero2", "tensor"), ("zero1", "whole")]
BF16: dict[str, dict[str, Any]] = {
    "bf16_zero1": {"precision": "bfloat16", "zero_optimization": {"stage": 1}},
    "bf16_zero2": {"precision": "bfloat16", "zero_optimization": {"stage": 2}},
    "bf16_zero3": {"precision": "bfloat16", "zero_optimization": {"stage": 3}},
    "bf16_tensor": {"precision": "bfloat16", "model_parallel_size": 2},
    "bf16_whole": {"precision": "bfloat16", "data_types": {"grad_accum_dtype": "bf16"}},
    "fp32": {},
}
FOUR: dict[str, dict[str, Any]] = {
    "tensor_pipeline": {"model_parallel_size": 2, "pipe_parallel_size": 2},
    "tensor_zero3": {"model_parallel_size": 2, "zero_optimization": {"stage": 3}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "pipeline_data": {"pipe_parallel_size": 2},
}


def judge(found: list[Any], pairs: list[tuple[str, str]], states: set[str], loss: float = 1e-6) -> None:
    """Nothing was lost or changed on the way."""
    assert set(found[0]) == set(pairs)
    for pair, seen in found[0].items():
        assert seen["names"] == [] and seen["unequal"] == [], pair
        assert set(seen["states"]) == {"", *states}, pair
        assert seen["rows"], pair
        assert seen["loss"] <= loss, (pair, seen["loss"])


def went(tmp_path: Path, pairs: list[tuple[str, str]], layouts: dict[str, Any] = LAYOUTS, *, world: int = 2, **more: Any) -> list[Any]:
    """What `changes` found on every rank."""
    place = {"init": False, "folder": str(tmp_path), "layouts": layouts, "pairs": pairs}
    return run_distributed(changes, world, 450, **place, **{"style": "neox", **more})


@pytest.mark.parametrize("pairs", [PAIRS[::2], pytest.param(PAIRS, marks=pytest.mark.full)], ids=["half", "all"])
def test_every_layout_goes_on_at_every_other(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """A model with biases in shares, in float32."""
    judge(went(tmp_path, pairs), pairs, {"exp_avg", "exp_avg_sq"})


def test_tied_weights_go_along(tmp_path: Path) -> None:
    """The first and the last stage of a pipeline hold the same embedding."""
    pairs = [("tensor", "pipeline"), ("pipeline", "zero3"), ("pipeline", "tensor")]
    judge(went(tmp_path, pairs, style="gpt2"), pairs, {"exp_avg", "exp_avg_sq"})


def test_sixteen_bits_go_on_from_their_float32_masters(tmp_path: Path) -> None:
    """The forms in which DeepSpeed keeps masters of bfloat16 weights, and from there to float32."""
    # One process in bfloat16 is 6e-4 from one in float32.
    pairs = [("bf16_zero1", "bf16_zero3"), ("bf16_zero3", "bf16_tensor"), ("bf16_zero3", "bf16_whole"), ("bf16_zero1", "fp32")]
    judge(went(tmp_path, pairs, BF16), pairs, {"exp_avg", "exp_avg_sq"}, loss=2e-3)


@pytest.mark.full
@pytest.mark.parametrize("pairs", [pytest.param(list(permutations(BF16, 2)), id="bf16")])
def test_sixteen_bits_every_way(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """All pairs."""
    judge(went(tmp_path, pairs, BF16), pairs, {"exp_avg", "exp_avg_sq"}, loss=2e-3)


@pytest.mark.full
@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        ({"type": "Lion", "params": {"lr": 1e-4}}, {"exp_avg"}),
        ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, {"momentum_buffer"}),
    ],
    ids=["lion", "momentum"],
)
def test_other_optimizers_go_on(tmp_path: Path, optimizer: dict[str, Any], states: set[str]) -> None:
    """Whatever state has the shape of its parameter."""
    judge(went(tmp_path, SOME, optimizer=optimizer), SOME, states)


@pytest.mark.full
def test_muon_goes_on_from_stages_to_one(tmp_path: Path) -> None:
    """Over whole matrices."""
    pairs = [("whole", "pipeline"), ("pipeline", "whole")]
    judge(went(tmp_path, pairs, optimizer={"type": "Muon", "params": {"lr": 1e-3}}), pairs, {"exp_avg", "exp_avg_sq", "momentum_buffer"})


@pytest.mark.full
def test_grouped_heads_and_gated_layers_go_on(tmp_path: Path) -> None:
    """Weights that are split part by part; and parts of sequences."""
    layouts = {**LAYOUTS, "context": {"context_parallel_size": 2}}
    pairs = [*SOME, ("context", "zero2"), ("tensor", "context")]
    judge(went(tmp_path, pairs, layouts, style="llama"), pairs, {"exp_avg", "exp_avg_sq"})


@pytest.mark.full
def test_four_ranks_share_in_two_ways_at_once(tmp_path: Path) -> None:
    """Stages of tensor ranks, and tensor ranks of partitions."""
    pairs = list(permutations(FOUR, 2))
    judge(went(tmp_path, pairs, FOUR, world=4), pairs, {"exp_avg", "exp_avg_sq"})
