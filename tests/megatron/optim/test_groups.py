# SPDX-License-Identifier: Apache-2.0
"""Weight-decay groups by parameter role."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.model.attention.layer import SelfAttention
from megatron.model.spec import AttentionSpec, NormKind, NormSpec
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group
from megatron.mpu.sharding import Role, roles_of
from megatron.optim.build import build_groups, build_optimizer, build_scheduler
from megatron.optim.groups import EVEN, groups_by_role, mup_rates, parameter_groups
from megatron.optim.schedules import Decay, LRScheduler, ScheduleSpec
from support.specs import model_spec
from support.tiny import tiny


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


def test_laws_of_table_8() -> None:
    assert mup_rates("adam", 4.0) == {Role.HIDDEN: 0.25, Role.EMBEDDING: 1.0, Role.VECTOR: 1.0}
    assert mup_rates("sgd", 4.0) == {Role.HIDDEN: 1.0, Role.EMBEDDING: 4.0, Role.VECTOR: 4.0}
    assert mup_rates("muon", 4.0) == EVEN
    with pytest.raises(ConfigError, match="no muP law for optimizer 'madgrad_wd'"):
        mup_rates("madgrad_wd", 4.0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_groups_follow_roles(optimizer: str) -> None:
    model = Transformer(model_spec(tied=True))
    roles = roles_of(model)
    groups = groups_by_role(model, 0.1, mup_rates(optimizer, 4.0))
    assert [{roles[id(p)] for p in group["params"]} for group in groups] == (
        [{Role.EMBEDDING}, {Role.VECTOR}, {Role.HIDDEN}] if optimizer == "adam" else [{Role.HIDDEN}, {Role.EMBEDDING}, {Role.VECTOR}]
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["lr_mult"] == 1.0, "the first group's rate is reported"
    # What is forgotten per step, rate times decay, is the same for all matrices.
    decays = sorted(group["weight_decay"] * group["lr_mult"] for group in groups)
    assert decays == [0.0, pytest.approx(0.1), pytest.approx(0.1)]


def test_the_schedule_keeps_the_ratio() -> None:
    model = Transformer(model_spec())
    optimizer = torch.optim.AdamW(groups_by_role(model, 0.1, mup_rates("adam", 8.0)))
    scheduler = LRScheduler(optimizer, ScheduleSpec(start_lr=1e-3, decay_style=Decay.COSINE, end_iter=8, warmup_iter=2.0))
    for _ in range(5):
        scheduler.step()
        plain, other, hidden = scheduler.get_lr()
        assert plain == other == hidden * 8.0 > 0.0
    # A checkpoint's groups bring their ratio back, and the schedule goes on with it.
    again = torch.optim.AdamW(groups_by_role(model, 0.1, mup_rates("adam", 8.0)))
    again.load_state_dict(optimizer.state_dict())
    resumed = LRScheduler(again, scheduler.spec)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_lr() == scheduler.get_lr()


def test_only_use_mup_makes_such_groups() -> None:
    from megatron.model.build import build_transformer
    from megatron.neox_arguments import NeoXArgs

    def groups(**keys: Any) -> list[dict[str, Any]]:
        args = NeoXArgs.from_dict(tiny("gpt2", padded_vocab_size=128, **keys))
        return build_groups(args, build_transformer(args))

    assert all(set(group) == {"params", "weight_decay"} for group in groups(mup_base_hidden_size=16))
    assert [group["lr_mult"] for group in groups(use_mup=True, mup_base_hidden_size=16)] == [1.0, 1.0, 0.25]
    args = NeoXArgs.from_dict(tiny("gpt2", padded_vocab_size=128, use_mup=True, mup_base_hidden_size=16))
    optimizer = build_optimizer(args, build_transformer(args), torch.device("cpu"))
    assert build_scheduler(args, optimizer).get_lr() == [0.0005, 0.0005, 0.000125]
