# SPDX-License-Identifier: Apache-2.0
"""Every parameter of a model has the role its module gives it."""

from __future__ import annotations

import pytest
from torch import nn

from megatron.model.spec import MLPSpec, Positions
from megatron.model.transformer import Transformer
from megatron.mpu.roles import Role, roles_of
from support.specs import HIDDEN, model_spec, norm_spec


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
