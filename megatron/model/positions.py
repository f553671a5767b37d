# SPDX-License-Identifier: Apache-2.0
"""Positions inside attention: rotary embeddings and their scalings, T5 relative bias, ALiBi.

Tables are functions of the positions asked for, so there is no longest length; they are made in float32 on the fly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.model.spec import RopeScaling, RotarySpec, RpeSpec
from megatron.mpu.groups import Group
from megatron.mpu.sharding import InitialValue, Sharding, Split, local_size

# ---- rotary ------------------------------------------------------------------------------------------------------


def rotary_frequencies(spec: RotarySpec) -> tuple[Tensor, float]:
    """Angle per position of each of the r / 2 pairs, and the factor on cos and sin (1 except for YaRN).

    Su et al., arXiv 2104.09864, eq. 15: base^(-2i/r). Scaled as spec.scaling says. Tensor [r / 2] float32 on the CPU.
    Raises ConfigError for an unknown scaling or one that lacks the original length.
    """
    base = spec.base
    scaling = spec.scaling
    if scaling is not None and scaling.kind == "ntk":
        # NTK-aware: raise the base so that the slowest pair is interpolated by `factor` and the fastest not at all.
        base = base * scaling.factor ** (spec.dim / (spec.dim - 2))
    # Integers first: while ZeRO-3 partitions what is built, torch makes floats in the model's precision.
    plain = 1.0 / base ** (torch.arange(0, spec.dim, 2, device="cpu").to(torch.float32) / spec.dim)
    if scaling is None or scaling.kind in ("ntk", "default"):
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "yarn":
        return _yarn(plain, spec, scaling), _yarn_attention(scaling)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    raise ConfigError(f"rope_scaling type {scaling.kind!r} is not known", where="rope_scaling", fix="linear, ntk, yarn or llama3")


def _original_length(scaling: RopeScaling) -> int:
    if scaling.original_max_position_embeddings is None:
        raise ConfigError(
            f"rope_scaling type {scaling.kind!r} needs the length the model was trained with",
            where="rope_scaling",
            fix="add original_max_position_embeddings",
        )
    return scaling.original_max_position_embeddings


def _yarn(plain: Tensor, spec: RotarySpec, scaling: RopeScaling) -> Tensor:
    """Interpolate slow pairs, keep fast ones, blend between (Peng et al., arXiv 2309.00071, eq. 19-23)."""
    length = _original_length(scaling)

    def pair_that_turns(times: float) -> float:
        # Solves length * base^(-2i/r) = 2 pi times for i.
        return spec.dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(spec.base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), spec.dim - 1)
    index = torch.arange(spec.dim // 2, device="cpu").to(torch.float32)
    interpolated = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _yarn_attention(scaling: RopeScaling) -> float:
    """Temperature on q and k each (arXiv 2309.00071, eq. 22)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide slow pairs by `factor`, keep fast ones, blend by turns between (Llama 3.1)."""
    turns = _original_length(scaling) * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / scaling.factor * (1 - keep)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + r/2) of the first r features by their angle (half-split convention).

    x [b, s, n, d]; cos, sin [b or 1, s, 1, r/2] float32 -> [b, s, n, d]
    """
    half = cos.shape[-1]
    exact = x.float()
    first, second = exact[..., :half], exact[..., half : 2 * half]
    pieces = [torch.addcmul(first * cos, second, sin, value=-1.0), torch.addcmul(second * cos, first, sin)]
    if 2 * half < x.shape[-1]:
        pieces.append(exact[..., 2 * half :])
    return torch.cat(pieces, dim=-1).to(x.dtype)


class _Derived(nn.Module):
    """A module whose one stored tensor follows from its spec: written for the format, ignored when read."""

    stored = ""

    def values(self) -> Tensor | None:
        """What to write; None = nothing."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        values = self.values()
        if values is not None:
            destination[prefix + self.stored] = values

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + self.stored, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Rotary(_Derived):
    """Rotary position embedding. FORMAT: `inv_freq` [r / 2] is written only with save_freqs."""

    stored = "inv_freq"

    def __init__(self, spec: RotarySpec) -> None:
        super().__init__()
        if spec.dim % 2 or spec.dim < 2:
            raise ConfigError(f"rotary embeddings turn pairs, not {spec.dim} features", where="rotary_pct", fix="make the number even")
        self.spec = spec
        self.frequencies, self.factor = rotary_frequencies(spec)  # not a buffer: must stay float32 when the model is cast

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [b or 1, s] int64 -> cos and sin, each [b or 1, s, 1, r/2] float32."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions.to(torch.float32)[..., None, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)

    def values(self) -> Tensor | None:
        """The frequencies, when asked to be kept."""
        return self.frequencies if self.spec.save_freqs else None


# ---- biases on the scores ----------------------------------------------------------------------------------------


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """How far behind its query each key is, the last query being level with the last key; [s, t] int64, < 0 = ahead."""
    at = torch.arange(keys - queries, keys, device=device)
    return at[:, None] - torch.arange(keys, device=device)


class RelativeBias(nn.Module):
    """T5's relative position bias, causal (Raffel et al., arXiv 1910.10683, sec. 2.1): one learned number per bucket and head.

    FORMAT: weight [buckets, heads / tp]; the bias is weight * sqrt(d), added to q k / sqrt(d). NeoX shares one table among all layers.
    """

    def __init__(self, spec: RpeSpec, heads: int, head_dim: int, *, tp: Group) -> None:
        super().__init__()
        self.spec = spec
        self.factor = math.sqrt(head_dim)
        self.weight = nn.Parameter(torch.empty(spec.num_buckets, local_size(heads, tp.size, "attention heads")))
        nn.init.normal_(self.weight)

    def forward(self, queries: int, keys: int) -> Tensor:
        """Bias [n, s, t] for the last `queries` of `keys` positions."""
        behind = distances(queries, keys, self.weight.device).clamp(min=0)
        exact = self.spec.num_buckets // 2  # one bucket per distance up to here, then wider and wider ones
        spread = math.log(self.spec.max_distance / exact)
        wide = exact + (torch.log(behind.clamp(min=1).float() / exact) / spread * (self.spec.num_buckets - exact)).long()
        bucket = torch.where(behind < exact, behind, wide.clamp(max=self.spec.num_buckets - 1))
        return (self.weight[bucket] * self.factor).permute(2, 0, 1)

    def initial_values(self) -> Mapping[str, InitialValue]:
        """As the reference draws it, whatever `init_method` says."""
        return {"weight": "xavier_normal"}

    def tables(self) -> tuple[str, ...]:
        """The biases: one side is the buckets."""
        return ("weight",)

    def sharding(self) -> dict[str, Sharding]:
        """Heads."""
        return {"weight": Split(1)}


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi (Press et al., arXiv 2108.12409, sec. 3).

    A power of two n gives 2^(-8/n), 2^(-16/n), ...; other counts take those of the power below, then every other
    one of the power above.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (index + 1) / power) for index in range(power)]
    between = [2.0 ** (-4.0 * (index + 1) / power) for index in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]


class Alibi(_Derived):
    """A penalty of slope * distance on the scores of each head. FORMAT: `slopes` [heads / tp] is written, though it is known."""

    stored = "slopes"

    def __init__(self, heads: int, *, tp: Group) -> None:
        super().__init__()
        local = local_size(heads, tp.size, "attention heads")
        mine = alibi_slopes(heads)[tp.rank * local : (tp.rank + 1) * local]
        self.per_head = torch.from_numpy(np.array(mine, np.float32))  # not torch.tensor: see rotary_frequencies

    def forward(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Bias [n, s, t] float32 for the last `queries` of `keys` positions."""
        return -distances(queries, keys, device) * self.slopes(device)[:, None, None]

    def slopes(self, device: torch.device) -> Tensor:
        """Slopes [n] float32."""
        if self.per_head.device != device:
            self.per_head = self.per_head.to(device)
        return self.per_head

    def values(self) -> Tensor | None:
        """The slopes."""
        return self.per_head

    def sharding(self) -> dict[str, Sharding]:
        """Heads."""
        return {"slopes": Split(0)}
