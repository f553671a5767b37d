# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale on problems whose answers are known; what engines show of gradients is checked in test_norms.py."""

from __future__ import annotations

import doctest
import statistics

import pytest

from megatron.errors import ConfigError
from megatron.hooks import gradient_noise_scale
from megatron.hooks.gradient_noise_scale import NoiseScaleHook, noise_terms
from support.fake_engine import FakeEngine, drive, result


def test_estimates_are_unbiased() -> None:
    """Gradients drawn with a known mean and covariance: signal |G|^2 = 4, noise = trace of the covariance = 50."""
    import torch

    assert doctest.testmod(gradient_noise_scale).failed == 0
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((100,), 0.2, dtype=torch.float64)
    terms = []
    for _ in range(4000):
        samples = mean + 0.5**0.5 * torch.randn(16, 100, generator=generator, dtype=torch.float64)
        small = samples.view(4, 4, 100).mean(1).square().sum(1).mean()
        terms.append(noise_terms(small_square=float(small), big_square=float(samples.mean(0).square().sum()), small=4, big=16))
    assert statistics.fmean(term.signal for term in terms) == pytest.approx(4.0, rel=0.02)
    assert statistics.fmean(term.noise for term in terms) == pytest.approx(50.0, rel=0.02)


def test_what_cannot_be_measured() -> None:
    """One micro batch per step is an error; a skipped step counts for nothing; a signal of 0 gives no number."""
    import torch

    from megatron.neox_arguments import ConfigProblems, NeoXArgs
    from support.tiny import tiny

    with pytest.raises(ConfigProblems, match="a step has only one"):
        NeoXArgs.from_dict(tiny(log_gradient_noise_scale=True, gradient_accumulation_steps=1))
    NeoXArgs.from_dict(tiny(log_gradient_noise_scale=True, gradient_accumulation_steps=1, global_num_gpus=2))
    assert NeoXArgs.from_dict(tiny(gradient_noise_scale_cpu_offload=True)).ignored_keys() == ("gradient_noise_scale_cpu_offload",)
    with pytest.raises(ConfigError, match="a step has only one"):
        drive([NoiseScaleHook(micro_batches=1, batch=4, steps=1, send=lambda values, row: None)], [])

    class Model(FakeEngine):
        linear = torch.nn.Linear(1, 1, bias=False)

        def module(self) -> torch.nn.Module:
            return self.linear

    sent: list[dict[str, float]] = []
    engine = Model()
    hook = NoiseScaleHook(micro_batches=2, batch=4, steps=1, send=lambda values, row: sent.append(dict(row)))
    from megatron.hooks.base import TrainState

    hook.on_start(TrainState(), engine)
    for gradients, norm, skipped in (((1.0, 3.0), 4.0, True), ((1.0, 3.0), 4.0, False), ((2.0, -2.0), 0.0, False)):
        for value in gradients:
            (engine.linear.weight * value).sum().backward()
        hook.after_step(TrainState(), result(grad_norm=norm, skipped=skipped), engine)
    # Micro batch gradients 2 and 6, whole 4: signal (4 * 16 - 2 * 20) / 2 = 12, noise (20 - 16) / (1/2 - 1/4) = 16.
    assert sent == [{"noise_scale": pytest.approx(16 / 12)}]
    hook.on_stop(TrainState(), engine)
    engine.linear(torch.ones(1, 1)).sum().backward()
    assert hook._sum is None
