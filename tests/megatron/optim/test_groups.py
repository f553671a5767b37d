# SPDX-License-Identifier: Apache-2.0
"""Weight-decay groups by parameter role."""

from __future__ import annotations

import torch
from torch import nn

from megatron.model.attention.layer import SelfAttention
from megatron.model.spec import AttentionSpec, NormKind, NormSpec
from megatron.mpu.groups import Group
from megatron.optim.groups import parameter_groups


class Block(nn.Module):
    """An embedding tied to a head, a norm, a bias, an exempt matrix and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.state = nn.Parameter(torch.zeros(4, 2))
        self.frozen = nn.Parameter(torch.zeros(4, 2), requires_grad=False)

    def no_weight_decay(self) -> tuple[str, ...]:
        return ("state",)


def test_norms_of_queries_and_keys_do_not_decay() -> None:
    """Their scale is a matrix [heads, d]; it is a norm's all the same."""
    kind = NormSpec(kind=NormKind.LAYERNORM, size=8, eps=1e-5)
    spec = AttentionSpec(hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4, qk_norm=kind)
    layer = SelfAttention(spec, tp=Group.single())
    decay, plain = parameter_groups(layer, 0.1)
    assert names(layer, decay) == {"query_key_value.weight", "dense.weight"}
    assert names(layer, plain) == {"query_key_value.bias", "dense.bias", "qk_layernorm.weight", "qk_layernorm.bias"}


def names(module: nn.Module, group: dict[str, object]) -> set[str]:
    ids = {id(p) for p in group["params"]}  # type: ignore[attr-defined]
    return {name for name, p in module.named_parameters() if id(p) in ids}


def test_groups() -> None:
    block = Block()
    decay, plain = parameter_groups(block, 0.1)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert names(block, decay) == {"embed.weight", "dense.weight"}
    assert names(block, plain) == {"norm.weight", "norm.bias", "dense.bias", "state"}
    assert len(decay["params"]) + len(plain["params"]) == 6
    (only,) = parameter_groups(block, 0.0)
    assert len(only["params"]) == 6 and only["weight_decay"] == 0.0
    (norms,) = parameter_groups(block.norm, 0.1)
    assert norms["weight_decay"] == 0.0
    # Under ZeRO-3 the local tensor is an empty vector; the whole shape decides.
    block.dense.weight.ds_shape = block.dense.weight.shape  # type: ignore[attr-defined]
    block.dense.weight.data = torch.empty(0)
    assert "dense.weight" in names(block, parameter_groups(block, 0.1)[0])
