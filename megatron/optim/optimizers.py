# SPDX-License-Identifier: Apache-2.0
"""Named optimizers over parameter groups. Never compiles anything; knows no configuration object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from megatron.errors import BackendError, ConfigError
from megatron.optim.lion import Lion

Groups = list[dict[str, Any]]

NOT_BUILT = ("onebitadam", "sm3", "madgrad_wd", "muon")
_IGNORED = frozenset({"freeze_step", "cuda_aware", "torch_adam"})
"""Parameters that select or tune an implementation we do not use; the numbers do not depend on them."""


def make_optimizer(name: str, params: Mapping[str, Any], groups: Groups, device: torch.device) -> Optimizer:
    """An optimizer over `groups`.

    name:   lower case: adam, adamw, cpu_torch_adam, cpu_adam, sgd, lion
    params: numbers from the configuration: lr, betas, eps, ... (weight decay stands in the groups)

    Raises ConfigError for an unknown name or parameter, BackendError when the implementation is not on this machine.
    """
    if name in NOT_BUILT:
        raise ConfigError(
            f"optimizer {name!r} comes with the parallelism work and is not built yet",
            where="optimizer.type",
            mend=f"use one of: {', '.join(_MAKERS)}",
        )
    if name not in _MAKERS:
        raise ConfigError(f"unknown optimizer {name!r}", where="optimizer.type", mend=f"use one of: {', '.join(_MAKERS)}")
    make, allowed = _MAKERS[name]
    numbers = {key: value for key, value in params.items() if key not in _IGNORED and key != "weight_decay"}
    if not numbers.get("momentum", 1) and "momentum" not in allowed:
        del numbers["momentum"]  # the default block of a configuration without an optimizer carries momentum 0
    unknown = sorted(set(numbers) - allowed)
    if unknown:
        raise ConfigError(
            f"optimizer {name!r} has no parameter {', '.join(unknown)}",
            where=f"optimizer.params.{unknown[0]}",
            mend=f"allowed: {', '.join(sorted(allowed | {'weight_decay'}))}",
        )
    if "betas" in numbers:
        numbers["betas"] = _betas(numbers["betas"])
    return make(groups, numbers, device)


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(0.0 <= float(v) < 1.0 for v in value):
        raise ConfigError(f"betas {value!r}: two numbers in [0, 1) are needed", where="optimizer.params.betas", mend="e.g. [0.9, 0.95]")
    return float(value[0]), float(value[1])


def _adam(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    """Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), or with L2 in the gradient for `adam_w_mode: false`.

    torch's fused kernel: on CUDA one launch per dtype, on CPU one pass over each tensor instead of a dozen.
    """
    decoupled = numbers.pop("adam_w_mode", True)
    if not numbers.pop("bias_correction", True):
        raise ConfigError("Adam without bias correction is not offered", where="optimizer.params.bias_correction", mend="remove the key")
    if numbers.pop("amsgrad", False):
        raise ConfigError("the fused Adam kernels have no amsgrad", where="optimizer.params.amsgrad", mend="remove the key")
    kind = AdamW if decoupled else Adam
    return kind(groups, fused=device.type in ("cpu", "cuda"), **numbers)


def _adamw(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    """AdamW; an explicit `adam_w_mode: false` contradicts the name."""
    if not numbers.get("adam_w_mode", True):
        raise ConfigError("AdamW with adam_w_mode: false", where="optimizer.params.adam_w_mode", mend="use type: Adam, or remove the key")
    return _adam(groups, numbers, device)


def _cpu_adam(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    """DeepSpeed's CPU Adam (for offload), only where its op was compiled at installation."""
    try:
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise BackendError(f"cpu_adam needs deepspeed: {error}", where="optimizer.type", mend="use type: Adam") from error
    if not installed_ops.get("cpu_adam", False):
        raise BackendError(
            "cpu_adam needs DeepSpeed's cpu_adam op, which was not compiled when DeepSpeed was installed",
            where="optimizer.type",
            mend="use type: Adam (fused on CPU too) or cpu_torch_adam, or reinstall with DS_BUILD_CPU_ADAM=1",
        )
    kwargs = {"adamw_mode" if key == "adam_w_mode" else key: value for key, value in numbers.items()}
    made: Optimizer = DeepSpeedCPUAdam(groups, **kwargs)
    return made


def _sgd(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    """Stochastic gradient descent; weight decay is added to the gradient."""
    return SGD(groups, fused=device.type in ("cpu", "cuda"), **numbers)


def _lion(groups: Groups, numbers: dict[str, Any], device: torch.device) -> Optimizer:
    return Lion(groups, **numbers)


_ADAM_KEYS = frozenset({"lr", "betas", "eps", "adam_w_mode", "bias_correction", "amsgrad"})
_Maker = Callable[[Groups, dict[str, Any], torch.device], Optimizer]
_MAKERS: Mapping[str, tuple[_Maker, frozenset[str]]] = MappingProxyType(
    {
        "adam": (_adam, _ADAM_KEYS),
        "adamw": (_adamw, _ADAM_KEYS),
        "cpu_torch_adam": (_adam, _ADAM_KEYS),
        "cpu_adam": (_cpu_adam, _ADAM_KEYS),
        "sgd": (_sgd, frozenset({"lr", "momentum", "nesterov", "dampening"})),
        "lion": (_lion, frozenset({"lr", "betas"})),
    }
)
