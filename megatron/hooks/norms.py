# SPDX-License-Identifier: Apache-2.0
"""What is measured of gradients and weights: norms of every parameter, its gradient and its optimizer state, the share of zero gradients,
and the gradient noise scale: the batch size beyond which larger batches hardly help (McCandlish et al., arXiv 1812.06162).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron.deepspeed_private import entries_of, is_tied_again
from megatron.engine.base import Engine, LocalShards, StepResult
from megatron.engine.deepspeed_mpu import counted_here
from megatron.errors import ConfigError, TrainingError
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.mpu.collectives import of_all_ranks
from megatron.mpu.comm import all_reduce
from megatron.mpu.sharding import Split, Summed, sharding_of

Send = Callable[[Mapping[str, float], Mapping[str, float]], None]
"""(values for the trackers, values for the row of metrics.jsonl) of the step under way."""


@dataclass(frozen=True, kw_only=True)
class NormsPlan:
    """What is asked for."""

    parameters: bool = False
    gradients: bool = False
    zeros: bool = False
    states: bool = False

    @property
    def anything(self) -> bool:
        """Whether there is something to do."""
        return self.parameters or self.gradients or self.zeros or self.states

    @property
    def before_update(self) -> bool:
        """Whether gradients have to be seen, which do not outlive the update."""
        return self.gradients or self.zeros


PARAMETERS, GRADIENTS, ZEROS, STATES = "parameter_norms", "gradient_norms", "pct_grad_zeros", "optimizer_state_norms"


class NormsHook(Hook):
    """Measures on every rank, each rank its shards; one sum over the ranks that share them and one transfer to the host per step.

    Trackers get one number per parameter, the row of metrics.jsonl one per kind: the norm over all parameters, or the share
    of zeros among all entries. Gradients are those before clipping, parameters and states those after the update.
    Must stand before the metrics in the list.
    """

    def __init__(self, *, plan: NormsPlan, send: Send) -> None:
        self.plan = plan
        self.send = send
        self._parameters: dict[str, nn.Parameter] = {}
        self._pieces: LocalShards | None = None
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._census = Census()

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Look at the trained parameters from now on."""
        self._parameters = {name: p for name, p in engine.module().named_parameters() if p.requires_grad}
        self._pieces = engine.local_shards()
        self._census = census_of(self._parameters, engine)
        if self.plan.before_update:
            engine.before_update(self._look_at_gradients)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Measure what outlives the update, and send everything."""
        shards = engine.local_shards() if self._pieces is None else self._pieces
        sums = dict(self._seen)
        self._seen = {}
        if self.plan.before_update and not sums:
            raise TrainingError(
                "the engine updated the weights without showing the gradients",
                where="log_grad_norm, log_grad_pct_zeros",
                fix="set pipe_parallel_size: 0, or remove these keys",
            )
        with torch.no_grad():
            if self.plan.parameters:
                sums |= {(PARAMETERS, name): square(shards.weight(p)) for name, p in self._parameters.items()}
            if self.plan.states:
                sums |= self._states(shards)
        self._send(self._total(sums, shards.sharded, engine))
        return Verdict.CONTINUE

    def _look_at_gradients(self) -> None:
        if self._pieces is None:
            return
        for name, parameter in self._parameters.items():
            gradient = self._pieces.gradient(parameter)
            # A parameter that took no part has a gradient of zeros.
            if gradient is None:
                gradient = torch.zeros_like(self._pieces.weight(parameter))
            if self.plan.gradients:
                self._seen[GRADIENTS, name] = square(gradient)
            if self.plan.zeros:
                self._seen[ZEROS, name] = (gradient == 0).sum().double()

    def _states(self, shards: LocalShards) -> dict[tuple[str, str], Tensor]:
        found = {name: shards.states(p) for name, p in self._parameters.items()}
        kinds = sorted({kind for states in found.values() for kind in states})
        none = torch.zeros(0)
        # Every rank measures the same list: a rank with no shard of a parameter adds 0.
        return {(f"{STATES}/{kind}", name): square(found[name].get(kind, none)) for kind in kinds for name in found}

    def _total(self, sums: Mapping[tuple[str, str], Tensor], sharded: bool, engine: Engine) -> dict[tuple[str, str], float]:
        if not sums:
            return {}
        groups = engine.groups
        vector = torch.stack([value.to(engine.device) for value in sums.values()])
        if sharded:
            vector = all_reduce(vector, groups.replicas)
        if groups.tp.size > 1:
            vector = all_reduce(vector * vector.new_tensor([self._census.share(*key, groups.tp.size) for key in sums]), groups.tp)
        own = {key: value for key, value in zip(sums, vector.tolist(), strict=True) if key[1] not in self._census.again}
        return {key: value for stage in of_all_ranks(own, groups.pp) for key, value in stage.items()}

    def _send(self, sums: Mapping[tuple[str, str], float]) -> None:
        values: dict[str, float] = {}
        totals: dict[str, float] = {}
        entries = self._census.entries
        for (kind, name), amount in sums.items():
            totals[kind] = totals.get(kind, 0.0) + amount
            if kind == ZEROS:
                values[f"{kind}/{name}"] = 100.0 * amount / max(1, entries[name])
            elif kind.startswith(STATES):
                values[f"{STATES}/{name}_{kind.removeprefix(f'{STATES}/')}"] = math.sqrt(amount)
            else:
                values[f"{kind}/{name}"] = math.sqrt(amount)
        everything = max(1, sum(entries.values()))
        row = {
            _ROW.get(kind, f"optimizer_state_norm_{kind.rpartition('/')[2]}"): 100.0 * total / everything
            if kind == ZEROS
            else math.sqrt(total)
            for kind, total in totals.items()
        }
        self.send(values, row)


_ROW: dict[str, str] = {PARAMETERS: "parameter_norm", GRADIENTS: "gradient_norm", ZEROS: "pct_grad_zeros"}


def square(tensor: Tensor) -> Tensor:
    """Sum of squares: a float64 scalar, which a sum over many parameters and ranks keeps exact enough."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm.double().square()


@dataclass(frozen=True, kw_only=True)
class Census:
    """How the parameters of the whole model lie over tensor and pipeline ranks.

    entries: of every parameter of all stages, whole
    counted: parameters of which this rank's shard enters a sum over tensor ranks
    summed:  parameters of which each tensor rank has a share, all alike: the sum of them is the parameter
    again:   parameters that an earlier stage has, too
    """

    entries: Mapping[str, int] = field(default_factory=dict)
    counted: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()
    again: frozenset[str] = frozenset()

    def share(self, kind: str, name: str, ranks: int) -> float:
        """What a sum of squares on this rank counts for in the sum over `ranks` tensor ranks."""
        if name not in self.counted:
            return 0.0
        # The gradient of every share, and the state made of it, is that of the whole already.
        return float(ranks**2) if kind == PARAMETERS and name in self.summed else 1.0


def census_of(parameters: Mapping[str, nn.Parameter], engine: Engine) -> Census:
    """A collective call of all ranks."""
    groups, table = engine.groups, sharding_of(engine.module())
    counted = counted_here(groups.tp)
    whole = {name: entries_of(p) * (groups.tp.size if isinstance(table.get(name), Split) else 1) for name, p in parameters.items()}
    again = frozenset(name for name, p in parameters.items() if is_tied_again(p))
    stages = of_all_ranks({name: size for name, size in whole.items() if name not in again}, groups.pp)
    return Census(
        entries={name: size for stage in stages for name, size in stage.items()},
        counted=frozenset(name for name, p in parameters.items() if counted(p)),
        summed=frozenset(name for name in parameters if isinstance(table.get(name), Summed)),
        again=again,
    )


class NoiseTerms(NamedTuple):
    """Unbiased estimates (arXiv 1812.06162, eq. A.2): squared norm of the true gradient, and trace of its per-sample covariance."""

    signal: float
    noise: float


def noise_terms(*, small_square: float, big_square: float, small: float, big: float) -> NoiseTerms:
    """Estimates from squared gradient norms at two batch sizes, in samples, small < big.

    >>> noise_terms(small_square=4.0 + 10.0 / 2, big_square=4.0 + 10.0 / 8, small=2, big=8)
    NoiseTerms(signal=4.0, noise=10.0)
    """
    signal = (big * big_square - small * small_square) / (big - small)
    noise = (small_square - big_square) / (1.0 / small - 1.0 / big)
    return NoiseTerms(signal, noise)


class NoiseScaleHook(Hook):
    """Reports noise / signal, in samples, from the gradients of the micro batches and of the whole batch.

    Each backward pass shows its own gradient to hooks of the parameters, so that no copy of a gradient is kept.
    Noise and signal are averaged over `steps` steps before their ratio is taken, which otherwise would be biased (appendix A.1).
    A ratio of which the signal is not above 0 says nothing and is left out: average more steps then.

    micro_batches: per optimizer step and data rank
    batch:         samples per optimizer step, over all data ranks
    """

    def __init__(self, *, micro_batches: int, batch: int, steps: int, send: Send) -> None:
        self.micro_batches = micro_batches
        self.batch = batch
        self.steps = steps
        self.send = send
        self._sum: Tensor | None = None
        self._terms: list[NoiseTerms] = []
        self._handles: list[RemovableHandle] = []

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Look at every gradient from now on.

        Raises ConfigError when there is only one micro batch in a step.
        """
        if self.micro_batches * engine.groups.dp.size < 2:
            raise ConfigError(
                "the gradient noise scale compares the gradients of several micro batches, and a step has only one",
                where="log_gradient_noise_scale",
                fix="set gradient_accumulation_steps to 2 or more, or use more data ranks",
            )
        counted = counted_here(engine.groups.tp)
        self._handles = [p.register_hook(self._add) for p in engine.module().parameters() if p.requires_grad and counted(p)]

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Form this step's estimates, and every `steps` steps the ratio."""
        seen, self._sum = self._sum, None
        if result.skipped or result.grad_norm is None or seen is None:
            return Verdict.CONTINUE
        dp = engine.groups.dp
        total = float(all_reduce(all_reduce(seen, dp), engine.groups.tp).item())
        parts = self.micro_batches * dp.size
        # What a rank sees of a micro batch is dp.size (the later mean over ranks) times the loss scale times its share of the sum
        # that is the whole gradient; times `parts`, the share is the micro batch's own gradient.
        scale = parts / dp.size / (result.loss_scale or 1.0)
        terms = noise_terms(
            small_square=total / parts * scale**2, big_square=result.grad_norm**2, small=self.batch / parts, big=float(self.batch)
        )
        self._terms.append(terms)
        if len(self._terms) == self.steps:
            signal, noise = (sum(values) / self.steps for values in zip(*self._terms, strict=True))
            self._terms = []
            if signal > 0:
                self.send({"train/noise_scale": noise / signal}, {"noise_scale": noise / signal})
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """Look no longer."""
        self._leave()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """As at a normal end."""
        self._leave()

    def _add(self, gradient: Tensor) -> None:
        amount = square(gradient.detach())
        self._sum = amount if self._sum is None else self._sum + amount

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
