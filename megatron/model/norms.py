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


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv 1607.06450); without weights when not affine."""

    def __init__(self, size: int, eps: float, *, tp: Group = ALONE, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.tp = tp
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> same shape."""
        weight = None if self.weight is None else comm.sum_weight_grad(self.weight, self.tp)
        bias = None if self.bias is None else comm.sum_weight_grad(self.bias, self.tp)
        # The fused kernel keeps mean and variance of 16-bit inputs in float32.
        return F.layer_norm(x, (self.size,), weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, tp: Group = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.size = size
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> same shape."""
        return rms_norm(x, (self.size,), comm.sum_weight_grad(self.scale, self.tp), self.eps)


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


def rms_norm(x: Tensor, shape: tuple[int, ...], scale: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the trailing `shape`; scale of that shape."""
    if x.dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu":
        # The CPU kernel rounds between its steps; the CUDA one does not.
        return F.rms_norm(x.float(), shape, None if scale is None else scale.float(), eps).to(x.dtype)
    return F.rms_norm(x, shape, scale, eps)


def build_norm(spec: NormSpec, *, tp: Group = ALONE) -> nn.Module:
    """The norm of a spec. FORMAT: parameters weight, bias | scale | g | none.

    tp: where its ranks spread the sequence, the norm sees this rank's part of it
    """
    if spec.kind is NormKind.RMSNORM:
        return RMSNorm(spec.size, spec.eps, tp=tp)
    if spec.kind is NormKind.SCALENORM:
        return ScaleNorm(spec.eps, tp=tp)
    return LayerNorm(spec.size, spec.eps, tp=tp, bias=spec.bias, affine=spec.kind is NormKind.LAYERNORM)


class HeadNorm(nn.Module):
    """One norm over all heads of queries or keys together, [heads, d] at once, with the heads spread over tp.

    Statistics are taken over every rank's heads, so the model is the same at any tp.
    FORMAT: weights are [heads / tp, d], or with `flat` [heads * d / tp]. Head by head they are split over tp.
    Raises ConfigError for ScaleNorm.
    """

    def __init__(self, spec: NormSpec, heads: int, head_dim: int, *, tp: Group, flat: bool) -> None:
        super().__init__()
        if spec.kind is NormKind.SCALENORM:
            raise ConfigError("scalenorm cannot normalise queries and keys", where="use_qk_layernorm", fix="use layernorm or rmsnorm")
        local = local_size(heads, tp.size, "attention heads")
        shape = (local * head_dim,) if flat else (local, head_dim)
        self.spec = spec
        self.tp = tp
        self.shape = (local, head_dim)
        self.count = heads * head_dim
        self.rms = spec.kind is NormKind.RMSNORM
        affine = spec.kind is not NormKind.NON_PARAMETRIC
        self.scale = nn.Parameter(torch.ones(shape)) if affine and self.rms else None
        self.weight = nn.Parameter(torch.ones(shape)) if affine and not self.rms else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine and not self.rms and spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, heads / tp, d] -> same shape."""
        learned = self.scale if self.rms else self.weight
        weight = None if learned is None else learned.view(self.shape)
        bias = None if self.bias is None else self.bias.view(self.shape)
        if self.tp.size == 1:
            if self.rms:
                return rms_norm(x, self.shape, weight, self.spec.eps)
            return F.layer_norm(x, self.shape, weight, bias, self.spec.eps)
        exact = x.float()
        if not self.rms:
            exact = exact - comm.sum_statistic(exact.sum((-2, -1), keepdim=True), self.tp) / self.count
        square = comm.sum_statistic(exact.square().sum((-2, -1), keepdim=True), self.tp) / self.count
        out = exact * torch.rsqrt(square + self.spec.eps)
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


class EachHeadNorm(nn.Module):
    """One norm of d features that every head of queries, or of keys, goes through by itself; heads are spread over tp.

    FORMAT: weights are [d], the same on every rank.
    Raises ConfigError for ScaleNorm.
    """

    def __init__(self, spec: NormSpec, head_dim: int, *, tp: Group) -> None:
        super().__init__()
        if spec.kind is NormKind.SCALENORM:
            raise ConfigError("scalenorm cannot normalise queries and keys", where="use_qk_layernorm", fix="use layernorm or rmsnorm")
        self.spec = spec
        self.tp = tp
        self.rms = spec.kind is NormKind.RMSNORM
        affine = spec.kind is not NormKind.NON_PARAMETRIC
        self.scale = nn.Parameter(torch.ones(head_dim)) if affine and self.rms else None
        self.weight = nn.Parameter(torch.ones(head_dim)) if affine and not self.rms else None
        self.bias = nn.Parameter(torch.zeros(head_dim)) if affine and not self.rms and spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, heads / tp, d] -> same shape."""
        # Every rank's heads have a part in the gradient of the one weight.
        scale, weight, bias = (None if p is None else comm.copy(p, self.tp) for p in (self.scale, self.weight, self.bias))
        if self.rms:
            return rms_norm(x, (x.shape[-1],), scale, self.spec.eps)
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.spec.eps)
