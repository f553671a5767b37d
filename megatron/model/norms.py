# SPDX-License-Identifier: Apache-2.0
"""Normalisations over the last features, and those over attention heads. Statistics in float32, output in the input's dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.model.spec import NormKind, NormSpec
from megatron.mpu import comm
from megatron.mpu.groups import Group
from megatron.mpu.sharding import Initial, InitialValue, Sharding, Split, local_size

ALONE = Group.single()


class Norm(nn.Module):
    """A layer norm, (x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv 1607.06450), or an RMS norm,
    x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, arXiv 1910.07467), over the last `size` features.

    heads: the features are those of one attention head, and each of the heads, which are spread over tp, is normalised by itself
    Raises ConfigError for ScaleNorm.
    """

    def __init__(self, spec: NormSpec, shape: tuple[int, ...], *, tp: Group = ALONE, heads: bool = False) -> None:
        """shape: of the parameters"""
        super().__init__()
        if spec.kind is NormKind.SCALENORM:
            raise ConfigError("scalenorm cannot normalise queries and keys", where="use_qk_layernorm", fix="use layernorm or rmsnorm")
        self.tp = tp
        self.eps = spec.eps
        self.shape = shape
        self.heads = heads
        self.rms = spec.kind is NormKind.RMSNORM
        affine = spec.kind is NormKind.LAYERNORM
        self.scale = nn.Parameter(torch.ones(shape)) if self.rms else None
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine and spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> same shape."""
        # Every rank's heads, or its part of a spread sequence, have a part in the gradient of the one weight.
        shared = comm.copy if self.heads else comm.sum_weight_grad
        weight, bias = (None if p is None else shared(p, self.tp) for p in self._learned())
        return self._normalise(x, weight, bias)

    def _learned(self) -> tuple[Tensor | None, Tensor | None]:
        return self.scale if self.rms else self.weight, self.bias

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if not self.rms:
            # The fused kernel keeps mean and variance of 16-bit inputs in float32.
            return F.layer_norm(x, self.shape, weight, bias, self.eps)
        if x.dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu":
            # The CPU kernel rounds between its steps; the CUDA one does not.
            return F.rms_norm(x.float(), self.shape, None if weight is None else weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, self.shape, weight, self.eps)


class ScaleNorm(nn.Module):
    """g * x / max(|x|, eps) with one learned length g (Nguyen and Salazar, arXiv 1910.05895)."""

    def __init__(self, eps: float, *, tp: Group = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> same shape."""
        exact = x.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).clamp(min=self.eps)
        out: Tensor = exact * (comm.sum_weight_grad(self.g, self.tp).float() / length)
        return out.to(x.dtype)


def build_norm(spec: NormSpec, *, tp: Group = ALONE) -> nn.Module:
    """The norm of a spec. FORMAT: parameters weight, bias | scale | g | none.

    tp: where its ranks spread the sequence, the norm sees this rank's part of it
    """
    return ScaleNorm(spec.eps, tp=tp) if spec.kind is NormKind.SCALENORM else Norm(spec, (spec.size,), tp=tp)


class HeadNorm(Norm):
    """One norm over all heads of queries or keys together, [heads, d] at once, with the heads spread over tp.

    Statistics are taken over every rank's heads, so the model is the same at any tp.
    FORMAT: weights are [heads / tp, d], or with `flat` [heads * d / tp]. Head by head they are split over tp.
    Raises ConfigError for ScaleNorm.
    """

    def __init__(self, spec: NormSpec, heads: int, head_dim: int, *, tp: Group, flat: bool) -> None:
        local = local_size(heads, tp.size, "attention heads")
        super().__init__(spec, (local * head_dim,) if flat else (local, head_dim), tp=tp)
        self.shape = (local, head_dim)
        self.count = heads * head_dim

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, heads / tp, d] -> same shape."""
        weight, bias = (None if p is None else p.view(self.shape) for p in self._learned())
        if self.tp.size == 1:
            return self._normalise(x, weight, bias)
        exact = x.float()
        if not self.rms:
            exact = exact - comm.sum_statistic(exact.sum((-2, -1), keepdim=True), self.tp) / self.count
        square = comm.sum_statistic(exact.square().sum((-2, -1), keepdim=True), self.tp) / self.count
        out = exact * torch.rsqrt(square + self.eps)
        out = out if weight is None else out * weight.float()
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def no_weight_decay(self) -> tuple[str, ...]:
        """All: what is written as a matrix [heads, d] is still the scale of a norm."""
        return tuple(name for name, _ in self.named_parameters())

    def initial_values(self) -> Mapping[str, InitialValue]:
        """Ones and zeros, also where they are written as a matrix."""
        return {name: Initial.KEEP for name, _ in self.named_parameters()}

    def sharding(self) -> dict[str, Sharding]:
        """Head by head."""
        return {name: Split(0) for name, _ in self.named_parameters()}
