# SPDX-License-Identifier: Apache-2.0
"""Per-parameter norms and the noise scale through every optimizer DeepSpeed has, against a plain torch loop."""

from __future__ import annotations

import doctest
import statistics
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError, TrainingError
from megatron.hooks import norms
from megatron.hooks.norms import NoiseScaleHook, noise_terms
from support.dist import run_distributed
from support.fake_engine import FakeEngine, drive, result
from support.measuring import by_plain_torch, measured

LAYOUTS = {
    "plain": {"zero_optimization": {"stage": 0}},
    "pipeline": {"pipe_parallel_size": 1},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "bf16": {"precision": "bfloat16"},
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_measures_equal_those_of_a_plain_loop(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Two data ranks, two micro batches each, two steps with clipping: every number of every parameter, on both ranks."""
    together = run_distributed(measured, world=2, timeout_s=120, init=False, folder=str(tmp_path), layout=layout)
    assert [step[:2] for step in together[0]] == [step[:2] for step in together[1]]
    half = "precision" in layout
    near = {"rel": 5e-2, "abs": 2e-4} if half else {"rel": 2e-4, "abs": 1e-7}
    truths = by_plain_torch(str(tmp_path))
    assert "noise_scale" not in together[0][0][1]
    scale = together[0][1][0].pop("train/noise_scale")
    assert scale == together[0][1][1]["noise_scale"] == pytest.approx(noise_scale(truths), rel=0.1 if half else 1e-3)
    for (values, row, engine_result), truth in zip(together[0], truths, strict=True):
        expected: dict[str, float] = {}
        for kind, tensors in (("parameter_norms", truth["weights"]), ("gradient_norms", truth["gradients"])):
            expected |= {f"{kind}/{name}": float(tensor.norm()) for name, tensor in tensors.items()}
        for state in ("exp_avg", "exp_avg_sq"):
            expected |= {f"optimizer_state_norms/{name}_{state}": float(tensor.norm()) for name, tensor in truth[state].items()}
        zeros = {f"pct_grad_zeros/{name}": 100.0 * float((grad == 0).float().mean()) for name, grad in truth["gradients"].items()}
        assert max(zeros.values()) > 10.0 and min(zeros.values()) == 0.0, "the check needs both"
        names = {_plain_name(name, layout): value for name, value in values.items()}
        assert names.keys() == expected.keys() | zeros.keys()
        assert {name: names[name] for name in expected} == pytest.approx(expected, **near)
        # Gradients of key biases are 0 but for rounding, so that one of 192 entries may be an exact 0 or not.
        assert {name: names[name] for name in zeros} == pytest.approx(zeros, abs=3.0 if half else 1.1)
        assert row["gradient_norm"] == pytest.approx(engine_result.grad_norm, rel=1e-4)
        whole = sum(float(tensor.double().square().sum()) for tensor in truth["weights"].values()) ** 0.5
        assert row["parameter_norm"] == pytest.approx(whole, rel=1e-2 if half else 1e-5)
        assert {"pct_grad_zeros", "optimizer_state_norm_exp_avg", "optimizer_state_norm_exp_avg_sq"} <= row.keys()


def noise_scale(truths: list[dict[str, Any]]) -> float:
    """From kept gradients of four micro batches of one sample each, averaged over the steps."""
    terms = []
    for truth in truths:
        small = statistics.fmean(float(vector.square().sum()) for vector in truth["micro_gradients"])
        big = sum(float(tensor.square().sum()) for tensor in truth["gradients"].values())
        terms.append(noise_terms(small_square=small, big_square=big, small=1, big=4))
    signal, noise = (statistics.fmean(values) for values in zip(*terms, strict=True))
    assert signal > 0
    return noise / signal


def _plain_name(name: str, layout: dict[str, Any]) -> str:
    """The pipeline names parameters without `sequential.`, and the shared embedding by its key."""
    if not layout.get("pipe_parallel_size"):
        return name
    kind, _, parameter = name.partition("/")
    return f"{kind}/sequential.{parameter.removeprefix('tied_modules.embed.') if 'tied' not in parameter else '0.' + parameter[21:]}"


def test_only_what_is_asked_for_is_done() -> None:
    """Without the keys there is no hook; an engine that shows no gradients is an error, not a silence."""
    import torch

    from megatron.hooks.build import measures
    from megatron.hooks.norms import NormsHook, NormsPlan
    from megatron.neox_arguments import NeoXArgs
    from support.tiny import tiny

    assert measures(NeoXArgs.from_dict(tiny()), lambda values, row: None) == []
    from megatron.engine.shards import WholeShards
    from support.fake_engine import FakeEngine

    class Shows(FakeEngine):
        def module(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 2)

        def local_shards(self) -> WholeShards:
            return WholeShards({}, lambda: 1.0, {})

    sent: list[Any] = []
    hook = NormsHook(plan=NormsPlan(parameters=True), send=lambda values, row: sent.append((values, row)))
    drive([hook], [result()], engine=Shows())
    assert set(sent[0][0]) == {"parameter_norms/weight", "parameter_norms/bias"} and set(sent[0][1]) == {"parameter_norm"}
    with pytest.raises(TrainingError, match="without showing the gradients"):
        drive([NormsHook(plan=NormsPlan(gradients=True), send=lambda values, row: None)], [result()], engine=Shows())


def test_estimates_are_unbiased() -> None:
    """Gradients drawn with a known mean and covariance: signal |G|^2 = 4, noise = trace of the covariance = 50."""
    import torch

    assert doctest.testmod(norms).failed == 0
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
