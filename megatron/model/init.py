# SPDX-License-Identifier: Apache-2.0
"""How weights start. Rows are drawn in blocks, each from a generator of its own: results do not depend on tp, pp or padding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.model.spec import InitSpec
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import Fill, Initial, Role, Sharding, Split, initial_values_of, local_size, roles_of, sharding_of, split

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]

BLOCK_ROWS = 256
"""Rows that one generator draws. A change here changes every run's initial weights."""


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

    def __call__(self, layer: nn.Module, name: str, groups: Groups) -> None:
        """Write the weights of `layer` in place, each as its module says (`initial_values`).

        name: unique over the model, the same at any layout (the slot number)
        """
        methods = {Initial.INPUT: self.spec.method, Initial.OUTPUT: self.spec.output_method}
        shardings, roles, stated = sharding_of(layer), roles_of(layer), initial_values_of(layer)
        for local, parameter in layer.named_parameters():
            value = stated[id(parameter)]
            if value is Initial.KEEP or parameter.is_meta:
                continue
            how = shardings[local]
            shard = WeightShard(how, groups.along(how))
            with nullcontext() if self.gather is None else self.gather([parameter]), torch.no_grad():
                if callable(value):
                    self._fill(parameter, value, f"{name}.{local}", shard)
                else:
                    method = value if isinstance(value, str) else methods[value]
                    self._write(parameter, method, f"{name}.{local}", shard, hidden=roles[id(parameter)] is Role.HIDDEN)

    def _write(self, parameter: nn.Parameter, method: str, name: str, place: WeightShard, *, hidden: bool) -> None:
        shape = place.whole_shape(parameter)
        law = law_of(method, shape, self, hidden=hidden)
        if law is None:
            self._fill(parameter, self._orthogonal(method), name, place)
            return
        # Not torch.empty: zero.Init changes what that gives.
        block = parameter.data.new_empty((BLOCK_ROWS, *shape[1:]), dtype=torch.float32)
        drawn = -1
        for number, within, first, count in place.pieces(shape[0]):
            if number != drawn:
                # Always a whole block: how many rows are drawn at once can change the numbers.
                law(block, self._generator(parameter, f"{name}:{number}"))
                drawn = number
            parameter[first : first + count].copy_(place.columns(block[within : within + count]))

    def _fill(self, parameter: nn.Parameter, fill: Fill, name: str, place: WeightShard) -> None:
        """Where entries depend on each other every rank writes the whole, and keeps its part."""
        whole = parameter.data.new_empty(place.whole_shape(parameter), dtype=torch.float32)
        fill(whole, self._generator(parameter, name))
        parameter.copy_(split(whole, place.how, place.group.rank, place.group.size))

    def _orthogonal(self, method: str) -> Fill:
        gains = {"orthogonal": 1.0, "scaled_orthogonal": math.sqrt(2.0 / self.num_layers)}
        if method not in gains:
            raise ConfigError(f"unknown initialiser '{method}'", where="init_method, output_layer_init_method")
        gain = gains[method] * self.spec.scale
        return lambda whole, generator: nn.init.orthogonal_(whole, gain=gain, generator=generator)

    def _generator(self, parameter: nn.Parameter, name: str) -> torch.Generator:
        return torch.Generator(parameter.device).manual_seed(seed_of(self.seed, name))


@dataclass(frozen=True)
class WeightShard:
    """Which part of a whole tensor a rank holds."""

    how: Sharding
    group: Group

    def whole_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of the matrix over all ranks."""
        shape = list(parameter.shape)
        if isinstance(self.how, Split):
            shape[self.how.dim] *= self.group.size
        return tuple(shape)

    def columns(self, rows: Tensor) -> Tensor:
        """What of whole rows [n, ...] is held."""
        by_rows = isinstance(self.how, Split) and self.how.dim == 0
        return rows if by_rows else split(rows, self.how, self.group.rank, self.group.size)

    def pieces(self, rows: int) -> Iterator[tuple[int, int, int, int]]:
        """The rows held, of `rows` in all, cut at the borders of blocks: block, its first row in it, first row here, count.

        >>> list(WeightShard(Split(0), Group(rank=1, size=2)).pieces(600))
        [(1, 44, 0, 212), (2, 0, 212, 88)]
        """
        here = 0
        for start, count in self._ranges(rows):
            while count > 0:
                number, within = divmod(start, BLOCK_ROWS)
                taken = min(count, BLOCK_ROWS - within)
                yield number, within, here, taken
                start, here, count = start + taken, here + taken, count - taken

    def _ranges(self, rows: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of every stretch that is held."""
        if not isinstance(self.how, Split) or self.how.dim != 0:
            yield 0, rows
            return
        start = 0
        for part in self.how.parts or (rows,):
            step = local_size(part, self.group.size, "a dimension of")
            yield start + self.group.rank * step, step
            start += part


def seed_of(seed: int, name: str) -> int:
    """A generator seed from the run's seed and a name, the same in every process."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal(std: float) -> Fill:
    return lambda block, generator: block.normal_(0.0, std, generator=generator)


def law_of(method: str, shape: Sequence[int], start: Initialiser, *, hidden: bool) -> Fill | None:
    """How the entries of a matrix [out, in] are drawn, independently of each other; None for other methods.

    small_init: Nguyen and Salazar, arXiv 1910.05895, sec. 2.2. wang_init: 2 / (L sqrt(h)), as in GPT-J.
    muP (Yang et al., arXiv 2203.03466, table 8): the method says the spread at the base width. From there that of a hidden matrix
    falls with the square root of its inputs; that of a table stays, so that an embedding can be the head, too.
    xavier (Glorot and Bengio, 2010, eq. 16) reads the whole shape, for a vocabulary with its padding.
    """
    std, mult, num_layers = start.spec.std, start.spec.width_mult, start.num_layers
    hidden_size = start.hidden_size / mult
    factor = start.spec.scale / (math.sqrt(mult) if hidden else 1.0)
    stds = {
        "normal": std,
        "scaled_normal": std / math.sqrt(2.0 * num_layers),
        "single_residual_scaled_normal": std / math.sqrt(num_layers),
        "small_init": math.sqrt(2.0 / (5.0 * hidden_size)),
        "wang_init": 2.0 / (num_layers * math.sqrt(hidden_size)),
    }
    if method in stds:
        return _normal(stds[method] * factor)
    if method not in ("xavier_uniform", "xavier_normal"):
        return None
    field = math.prod(shape[2:])
    fan_out, fan_in = shape[0] / (mult if hidden else 1.0) * field, shape[1] / mult * field
    std = math.sqrt(2.0 / (fan_in + fan_out)) * factor
    if method == "xavier_normal":
        return _normal(std)
    bound = std * math.sqrt(3.0)
    return lambda block, generator: block.uniform_(-bound, bound, generator=generator)
