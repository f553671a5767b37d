# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale: the batch size beyond which larger batches hardly help (McCandlish et al., arXiv 1812.06162)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron.engine.base import Engine, StepResult
from megatron.engine.deepspeed_mpu import counted_here
from megatron.errors import ConfigError
from megatron.hooks.base import BaseHook, TrainState, Verdict
from megatron.hooks.norms import Send, square
from megatron.mpu.comm import all_reduce


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


class NoiseScaleHook(BaseHook):
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
