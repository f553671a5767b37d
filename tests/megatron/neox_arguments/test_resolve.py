# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of derived values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.neox_arguments import resolve
from megatron.neox_arguments.resolve import Unsolvable, batch_triple, choose_precision, decay_iters, expand_attention, parse_split

sizes = st.integers(1, 64)


@given(sizes, sizes, sizes, st.integers(0, 7))
def test_the_batch_triangle_is_solved_from_what_is_known(micro, accumulation, ranks, unknown):
    train = micro * accumulation * ranks
    hide = [bool(unknown & bit) for bit in (1, 2, 4)]
    known = [None if hidden else value for hidden, value in zip(hide, (train, micro, accumulation), strict=True)]
    if all(hide):
        with pytest.raises(Unsolvable, match="no batch size"):
            batch_triple(*known, ranks)
        return
    found = batch_triple(*known, ranks)
    assert found[0] == found[1] * found[2] * ranks
    for given_value, value in zip(known, found, strict=True):
        assert given_value in (None, value)
    if sum(hide) <= 1:
        assert found == (train, micro, accumulation)


@given(sizes, st.none() | sizes, st.none() | sizes, sizes)
def test_a_triangle_without_solution_is_refused_with_its_arithmetic(train, micro, accumulation, ranks):
    divisor = (micro or 1) * (accumulation or 1) * ranks
    solvable = train == divisor if micro and accumulation else train % divisor == 0
    if solvable:
        assert batch_triple(train, micro, accumulation, ranks)[0] == train
    else:
        with pytest.raises(Unsolvable, match=str(divisor)):
            batch_triple(train, micro, accumulation, ranks)


def test_a_single_known_batch_size():
    assert batch_triple(None, 4, None, 2) == (8, 4, 1)
    assert batch_triple(8, None, None, 2) == (8, 4, 1)
    assert batch_triple(None, None, 3, 2) == (6, 1, 3)


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (None, 2, ["global"] * 2),
        ([[["global"], 2]], 2, ["global"] * 2),
        ([[["Global", "flash"], "all"]], 4, ["global", "flash"] * 2),
        ([[["global"], 1], [["flash"], "all"]], 3, ["global", "flash", "flash"]),
        (["mamba", "global"], 2, ["mamba", "global"]),
        ([[["rwkv"], 1], [["amlp", "gmlp"], 1]], 3, ["rwkv", "amlp", "gmlp"]),
    ],
)
def test_layer_types(config, layers, expected):
    assert expand_attention(config, layers) == expected


@pytest.mark.parametrize(
    "config", [[[["global"], 3]], ["globl", "global"], [[["global"], True]], [[[], 2]], [1, 2], [[["global"], -1]], []]
)
def test_wrong_layer_types(config):
    with pytest.raises(Unsolvable):
        expand_attention(config, 2)


@given(st.lists(st.sampled_from(resolve.LAYER_TYPES), min_size=1, max_size=4), st.integers(1, 5))
def test_expansion_is_stable(types, repeats):
    layers = expand_attention([[types, repeats]], len(types) * repeats)
    assert layers == types * repeats == expand_attention(layers, len(layers)) == expand_attention([[types, "all"]], len(layers))


def test_precision():
    assert choose_precision(None, {}, {}) == "fp32"
    assert choose_precision(None, {"enabled": False}, {"enabled": True}) == "bfloat16"
    assert choose_precision("fp16", {"enabled": True}, {}) == "fp16"
    for wrong in (("fp32", {"enabled": True}, {}), (None, {"enabled": True}, {"enabled": True}), ("fp16", {}, {"enabled": True})):
        with pytest.raises(Unsolvable, match="contradictory"):
            choose_precision(*wrong)


def test_schedule_length():
    assert decay_iters(7, 0.5, 100) == 7
    assert decay_iters(None, 0.9, 15) == 13
    assert decay_iters(None, None, 15) == 15
    assert decay_iters(None, None, 0) == 1
    assert decay_iters(None, 0.5, None) is None


def test_split_forms():
    assert parse_split("969,30,1") == parse_split("969/30/1") == (969, 30, 1)
    assert parse_split("1") == (1, 0, 0)
    for wrong in ("", "a", "1,2,3,4", "-1,2", "0,0", "nan", "1,,2"):
        assert parse_split(wrong) is None
