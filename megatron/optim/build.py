# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> optimizer, schedule and scheduler; which class serves which optimizer name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.neox_arguments.deepspeed import deepspeed_config
from megatron.neox_arguments.unfinished import refuse_value
from megatron.optim.cpu_adam import cpu_adam
from megatron.optim.groups import groups_by_role, muon_groups, mup_rates, parameter_groups, slow_shares
from megatron.optim.optimizers import MADGRADW, SM3, Lion, Muon, deepspeed_muon
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
    section, decay = args.optim, float(args.optim.weight_decay)
    if section.optimizer_type == "muon":
        params = section.optimizer.get("params", {}) if section.optimizer else {}
        matrix, other = (params[rate] / section.lr if params.get(rate) and section.lr else 1.0 for rate in MUON_RATES)
        groups = muon_groups(module, decay, matrix_mult=matrix, other_mult=other)
    elif args.model.use_mup:
        groups = groups_by_role(module, decay, mup_rates(section.optimizer_type, args.model.width_mult))
    else:
        groups = parameter_groups(module, decay)
    return slow_shares(groups, module, 1 if section.summed_bias_full_lr else args.runtime.model_parallel_size)


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


Groups = list[dict[str, Any]]

_IGNORED = frozenset({"freeze_step", "cuda_aware", "torch_adam"})
"""Parameters that select or tune an implementation we do not use; the numbers do not depend on them."""


def make_optimizer(name: str, params: Mapping[str, Any], groups: Groups, device: torch.device) -> Optimizer:
    """An optimizer over `groups`.

    name:   lower case: adam, adamw, cpu_torch_adam, cpu_adam, sgd, lion, sm3, madgrad_wd, muon, or zero_muon: muon under ZeRO
    params: numbers from the configuration: lr, betas, eps, ... (weight decay stands in the groups)

    Raises ConfigError for an unknown name or parameter, BackendError when the implementation is not on this machine.
    """
    if name not in _MAKERS:
        gone = "DeepSpeed no longer has OneBitAdam" if name == "onebitadam" else f"unknown optimizer {name!r}"
        raise ConfigError(gone, where="optimizer.type", fix=f"use one of: {', '.join(key for key in _MAKERS if key != 'zero_muon')}")
    make, allowed = _MAKERS[name]
    numbers = {key: value for key, value in params.items() if key not in _IGNORED and key != "weight_decay"}
    if not numbers.get("momentum", 1) and "momentum" not in allowed:
        del numbers["momentum"]  # the default block of a configuration without an optimizer carries momentum 0
    unknown = sorted(set(numbers) - allowed)
    if unknown:
        raise ConfigError(
            f"optimizer {name!r} has no parameter {', '.join(unknown)}",
            where=f"optimizer.params.{unknown[0]}",
            fix=f"allowed: {', '.join(sorted(allowed | {'weight_decay'}))}",
        )
    if "betas" in numbers:
        numbers["betas"] = _betas(numbers["betas"])
    if numbers.get("ns_method", "standard") not in ("standard", "gram"):
        what = f"ns_method {numbers['ns_method']!r} is not known"
        raise ConfigError(what, where="optimizer.params.ns_method", fix="use standard or gram")
    return make(groups, numbers, device)


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(0.0 <= float(v) < 1.0 for v in value):
        raise ConfigError(f"betas {value!r}: two numbers in [0, 1) are needed", where="optimizer.params.betas", fix="e.g. [0.9, 0.95]")
    return float(value[0]), float(value[1])


def _adam(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    """Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), or with L2 in the gradient for `adam_w_mode: false`.

    torch's fused kernel: on CUDA one launch per dtype, on CPU one pass over each tensor instead of a dozen.
    """
    decoupled = numbers.pop("adam_w_mode", True)
    if not numbers.pop("bias_correction", True):
        raise ConfigError("Adam without bias correction is not offered", where="optimizer.params.bias_correction", fix="remove the key")
    if numbers.pop("amsgrad", False):
        raise ConfigError("the fused Adam kernels have no amsgrad", where="optimizer.params.amsgrad", fix="remove the key")
    kind = AdamW if decoupled else Adam
    return kind(groups, fused=device.type in ("cpu", "cuda"), **numbers)


def _adamw(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    """AdamW; an explicit `adam_w_mode: false` contradicts the name."""
    if not numbers.get("adam_w_mode", True):
        raise ConfigError("AdamW with adam_w_mode: false", where="optimizer.params.adam_w_mode", fix="use type: Adam, or remove the key")
    return _adam(groups, numbers, device)


def _muon(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    """Muon over whole parameters. Both methods of the iteration are the same mathematics."""
    numbers.pop("ns_method", None)
    return Muon(groups, **numbers)


_Maker = Callable[[Groups, dict[str, Any], torch.device], Optimizer]
_ADAM_KEYS = frozenset({"lr", "betas", "eps", "adam_w_mode", "bias_correction", "amsgrad"})
_MUON_KEYS = frozenset({"lr", "momentum", "nesterov", "ns_steps", "ns_method", "betas", "eps"})
# name -> (how it is made, the parameters it takes)
_MAKERS: Mapping[str, tuple[_Maker, frozenset[str]]] = MappingProxyType(
    {
        "adam": (_adam, _ADAM_KEYS),
        "adamw": (_adamw, _ADAM_KEYS),
        "cpu_torch_adam": (_adam, _ADAM_KEYS),
        # Compiled where it is not installed, as a user asked for it by name.
        "cpu_adam": (lambda groups, numbers, _: cpu_adam(groups, numbers), _ADAM_KEYS | {"adamw_mode", "fp32_optimizer_states"}),
        "sgd": (
            lambda groups, numbers, device: SGD(groups, fused=device.type in ("cpu", "cuda"), **numbers),
            frozenset({"lr", "momentum", "nesterov", "dampening"}),
        ),
        "lion": (lambda groups, numbers, _: Lion(groups, **numbers), frozenset({"lr", "betas"})),
        "sm3": (lambda groups, numbers, _: SM3(groups, **numbers), frozenset({"lr", "momentum", "beta", "eps"})),
        "madgrad_wd": (lambda groups, numbers, _: MADGRADW(groups, **numbers), frozenset({"lr", "momentum", "eps"})),
        "muon": (_muon, _MUON_KEYS),
        # DeepSpeed fixes what a configuration rule asks for: five rounds, with Nesterov's look ahead.
        "zero_muon": (lambda groups, numbers, _: deepspeed_muon(groups, numbers), _MUON_KEYS),
    }
)
