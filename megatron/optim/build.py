# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> optimizer, schedule and scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.neox_arguments.deepspeed import deepspeed_config
from megatron.neox_arguments.unfinished import refuse_value
from megatron.optim.groups import groups_by_role, mup_rates, parameter_groups, slow_shares
from megatron.optim.muon import muon_groups
from megatron.optim.optimizers import make_optimizer
from megatron.optim.schedules import Decay, LRScheduler, OnResume, ScheduleSpec

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

log = get_logger(__name__)

MUON_RATES = ("muon_lr", "adam_lr")
"""Keys of Muon's parameters: the rate of hidden matrices, and that of all others, where it is not `lr`."""


def build_optimizer(args: NeoXArgs, module: nn.Module, device: torch.device) -> Optimizer:
    """The configured optimizer over the trainable parameters of `module`, decayed group first.

    Raises ConfigError for what is not built, BackendError for what this machine does not have.
    """
    section = args.optim
    refuse_value("use_bnb_optimizer", section.use_bnb_optimizer)
    params = dict(section.optimizer.get("params", {})) if section.optimizer else {}
    params["lr"] = section.lr
    name: str = section.optimizer_type
    if name == "muon":
        for rate in MUON_RATES:
            params.pop(rate, None)
        name = "zero_muon" if zero_stage(args) else name
    return make_optimizer(name, params, build_groups(args, module), device)


def build_groups(args: NeoXArgs, module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of `module` as the configured optimizer's groups."""
    ranks = 1 if args.optim.summed_bias_full_lr else args.runtime.model_parallel_size
    return slow_shares(_groups(args, module), module, ranks)


def _groups(args: NeoXArgs, module: nn.Module) -> list[dict[str, Any]]:
    section, decay = args.optim, float(args.optim.weight_decay)
    if section.optimizer_type == "muon":
        params = section.optimizer.get("params", {}) if section.optimizer else {}
        matrix, other = (params[rate] / section.lr if params.get(rate) and section.lr else 1.0 for rate in MUON_RATES)
        return muon_groups(module, decay, matrix_mult=matrix, other_mult=other)
    if args.model.use_mup:
        return groups_by_role(module, decay, mup_rates(section.optimizer_type, args.model.width_mult))
    return parameter_groups(module, decay)


def zero_stage(args: NeoXArgs) -> int:
    """The ZeRO stage that DeepSpeed is told; bfloat16 has one where the configuration says none."""
    return int(deepspeed_config(args)["zero_optimization"].get("stage", 0))


def build_schedule(args: NeoXArgs) -> ScheduleSpec:
    """The configured schedule. `warmup` is a share of the decay's length; the product need not be whole."""
    section = args.optim
    length = section.lr_decay_iters
    if section.lr is None or length is None:
        raise ConfigError("the schedule needs lr and lr_decay_iters", where="lr, lr_decay_iters", fix="set train_iters or lr_decay_iters")
    spec = ScheduleSpec(
        start_lr=section.lr,
        decay_style=Decay(section.lr_decay_style),
        warmup_iter=section.warmup * length,
        end_iter=length,
        min_lr=section.min_lr,
        wsd_decay_fraction=section.wsd_decay_fraction,
        warmup_from_zero=section.warmup_from_zero,
    )
    log.info(f"> learning rate decay style: {spec.decay_style.value}")
    return spec


def build_scheduler(args: NeoXArgs, optimizer: Optimizer) -> LRScheduler:
    """The object DeepSpeed steps; it already wrote the first step's rate into `optimizer`."""
    section = args.optim
    on_resume = OnResume.COMPARE
    if section.override_lr_scheduler:
        on_resume = OnResume.CONFIGURED
    elif section.use_checkpoint_lr_scheduler:
        on_resume = OnResume.SAVED
    return LRScheduler(optimizer, build_schedule(args), on_resume=on_resume)
