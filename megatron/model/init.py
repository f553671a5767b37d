# SPDX-License-Identifier: Apache-2.0
"""How weights start. Every weight is drawn whole from a generator of its own name, then cut: results do not depend on tp or pp."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.model.norms import HeadNorm
from megatron.model.positions import RelativeBias
from megatron.model.spec import InitSpec
from megatron.mpu.groups import Group
from megatron.mpu.layers import RowLinear
from megatron.mpu.sharding import Sharding, Split, sharding_of, split

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Initialiser:
    """Draws the weights of a layer.

    spec:       methods and standard deviation
    hidden_size, num_layers: what the width and depth dependent methods need
    seed:       of the run
    gather:     context that makes partitioned parameters whole while they are written (ZeRO-3); None = they are whole
    """

    spec: InitSpec
    hidden_size: int
    num_layers: int
    seed: int
    gather: Gather | None = None

    def __call__(self, layer: nn.Module, name: str, tp: Group) -> None:
        """Write the weights of `layer` in place. Vectors keep what their module set: ones in norms, zeros in biases.

        name: unique over the model, stable over tp and pp (the slot number)
        """
        shardings = sharding_of(layer)
        for prefix, module in layer.named_modules():
            method = self.method_of(module)
            if method is None:
                continue
            for local, parameter in module.named_parameters(recurse=False):
                if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:  # ds_shape: partitioned by ZeRO-3
                    continue
                full_name = f"{prefix}.{local}" if prefix else local
                with nullcontext() if self.gather is None else self.gather([parameter]):
                    self._write(parameter, method, f"{name}.{full_name}", shardings[full_name], tp)

    def method_of(self, module: nn.Module) -> str | None:
        """Name of the law for a module's matrices; None for norms, whose constructor already set them."""
        if isinstance(module, RowLinear):
            return self.spec.output_method
        if isinstance(module, HeadNorm):  # its matrix of ones is not a weight matrix
            return None
        if isinstance(module, RelativeBias):
            return "xavier_normal"
        return self.spec.method

    def _write(self, parameter: nn.Parameter, method: str, name: str, how: Sharding, tp: Group) -> None:
        if parameter.is_meta:
            return
        shape = list(parameter.shape)
        if isinstance(how, Split):
            shape[how.dim] *= tp.size
        generator = torch.Generator(parameter.device).manual_seed(seed_of(self.seed, name))
        whole = parameter.data.new_empty(shape, dtype=torch.float32)  # not torch.empty: zero.Init changes what that gives
        fill(whole, method, self, generator)
        with torch.no_grad():
            parameter.copy_(split(whole, how, tp.rank, tp.size))


def seed_of(seed: int, name: str) -> int:
    """A generator seed from the run's seed and a parameter's name, the same in every process."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_std(method: str, *, std: float, hidden_size: int, num_layers: int) -> float | None:
    """Standard deviation of the methods that draw from a plain normal; None for the others.

    small_init: Nguyen and Salazar, arXiv 1910.05895, sec. 2.2. wang_init: 2 / (L sqrt(h)), as in GPT-J.
    """
    laws = {
        "normal": std,
        "scaled_normal": std / math.sqrt(2.0 * num_layers),
        "single_residual_scaled_normal": std / math.sqrt(num_layers),
        "small_init": math.sqrt(2.0 / (5.0 * hidden_size)),
        "wang_init": 2.0 / (num_layers * math.sqrt(hidden_size)),
    }
    return laws.get(method)


def fill(weight: Tensor, method: str, law: Initialiser, generator: torch.Generator) -> None:
    """Draw `weight` [out, in] in place by the named method. Raises ConfigError for an unknown name."""
    std = normal_std(method, std=law.spec.std, hidden_size=law.hidden_size, num_layers=law.num_layers)
    if std is not None:
        nn.init.normal_(weight, 0.0, std, generator=generator)
    elif method == "xavier_uniform":
        nn.init.xavier_uniform_(weight, generator=generator)
    elif method == "xavier_normal":
        nn.init.xavier_normal_(weight, generator=generator)
    elif method == "orthogonal":
        nn.init.orthogonal_(weight, generator=generator)
    elif method == "scaled_orthogonal":
        nn.init.orthogonal_(weight, gain=math.sqrt(2.0 / law.num_layers), generator=generator)
    else:
        raise ConfigError(f"unknown initialiser '{method}'", where="init_method, output_layer_init_method")
