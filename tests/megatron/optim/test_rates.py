# SPDX-License-Identifier: Apache-2.0
"""muP's learning rates, as groups of an optimizer and through the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.errors import ConfigError
from megatron.model.transformer import Transformer
from megatron.mpu.roles import Role, roles_of
from megatron.optim.build import build_groups, build_optimizer, build_scheduler
from megatron.optim.groups import EVEN, groups_by_role, mup_rates
from megatron.optim.schedules import Decay, LRScheduler, ScheduleSpec
from support.specs import model_spec
from support.tiny import tiny


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
