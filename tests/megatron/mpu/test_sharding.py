# SPDX-License-Identifier: Apache-2.0
"""Splitting and joining are inverse, and modules speak for their own parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron.errors import ConfigError
from megatron.model.spec import MLPSpec, Positions
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group
from megatron.mpu.layers import ColumnLinear, RowLinear, VocabEmbedding
from megatron.mpu.sharding import Replicated, Role, Split, Summed, join, roles_of, sharding_of, split
from support.specs import HIDDEN, model_spec, norm_spec


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4]),
    dim=st.integers(0, 1),
    parts=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3),
    stated=st.booleans(),
)
def test_join_inverts_split(size: int, dim: int, parts: list[int], stated: bool) -> None:
    shape = [3, 3]
    shape[dim] = sum(parts)
    whole = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    for how in (Split(dim, tuple(parts) if stated else None), Replicated(), Summed()):
        shards = [split(whole, how, rank, size) for rank in range(size)]
        assert torch.equal(join(shards, how), whole)


def test_each_part_is_cut_by_itself() -> None:
    how = Split(0, parts=(4, 2, 2))
    assert split(torch.arange(8), how, 0, 2).tolist() == [0, 1, 4, 6]
    assert split(torch.arange(8), how, 1, 2).tolist() == [2, 3, 5, 7]
    with pytest.raises(ConfigError, match="cannot be divided"):
        split(torch.arange(9), Split(0), 0, 2)


def test_modules_state_their_sharding_on_the_meta_device() -> None:
    tp = Group.single()
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "embed": VocabEmbedding(8, 4, tp=tp),
                "up": ColumnLinear(4, 8, tp=tp, parts=(4, 4)),
                "down": RowLinear(8, 4, tp=tp),
                "share": RowLinear(8, 4, tp=tp, defer_reduce=True),
                "norm": nn.LayerNorm(4),
            }
        )
    assert sharding_of(model) == {
        "embed.weight": Split(0),
        "up.weight": Split(0, (4, 4)),
        "up.bias": Split(0, (4, 4)),
        "down.weight": Split(1),
        "down.bias": Replicated(),
        "share.weight": Split(1),
        "share.bias": Summed(),
        "norm.weight": Replicated(),
        "norm.bias": Replicated(),
    }


def by_name(model: nn.Module) -> dict[str, Role]:
    roles = roles_of(model)
    return {name: roles[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", [Positions.LEARNED, Positions.RPE, Positions.ROTARY])
def test_roles_of_a_model(tied: bool, positions: Positions) -> None:
    mlp = MLPSpec(hidden_size=HIDDEN, width=48, activation="swiglu")
    attention = {"qk_norm": norm_spec(size=HIDDEN // 4), "num_kv_heads": 4}
    roles = by_name(Transformer(model_spec(layers=1, tied=tied, positions=positions, ffn=mlp, attention=attention)))
    hidden = {name for name, role in roles.items() if role is Role.HIDDEN}
    tables = {name for name, role in roles.items() if role is Role.EMBEDDING}
    assert hidden == {f"sequential.2.{n}.weight" for n in ("attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2")}
    expected = {"sequential.0.word_embeddings.weight"} | ({"sequential.5.final_linear.weight"} if not tied else set())
    expected |= {"sequential.0.position_embeddings.weight"} if positions is Positions.LEARNED else set()
    expected |= {"sequential.2.attention.rpe.weight"} if positions is Positions.RPE else set()
    assert tables == expected
    # A norm's scale of two dimensions is a vector all the same.
    assert roles["sequential.2.attention.qk_layernorm.weight"] is Role.VECTOR


def test_a_partitioned_matrix_keeps_its_role() -> None:
    """Under ZeRO-3 the local tensor is an empty vector; the whole shape decides."""
    layer = nn.Linear(3, 2)
    layer.weight.ds_shape, layer.weight.data = layer.weight.shape, layer.weight.data.new_empty(0)  # type: ignore[assignment]
    assert by_name(layer) == {"weight": Role.HIDDEN, "bias": Role.VECTOR}
