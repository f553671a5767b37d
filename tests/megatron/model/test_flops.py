# SPDX-License-Identifier: Apache-2.0
"""Arithmetic against built models, published sizes and brute force."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.model.attention.layer import mean_visible
from megatron.model.flops import matmul_flops_per_token, parameter_count, reported_flops_per_step
from megatron.model.spec import BackendName, MLPSpec, NormKind, Positions, Residual
from megatron.model.transformer import Transformer
from support.specs import HIDDEN, model_spec, norm_spec

QK = {"qk_norm": norm_spec(size=8)}
SPECS = [
    *(model_spec(residual=residual) for residual in Residual),
    *(model_spec(positions=positions, tied=True) for positions in Positions),
    *(model_spec(norm=norm_spec(kind)) for kind in NormKind),
    model_spec(norm=norm_spec(bias=False), ffn=MLPSpec(hidden_size=HIDDEN, width=24, activation="swiglu", bias=False)),
    model_spec(attention={"num_kv_heads": 1, "bias": False}),
    model_spec(positions=Positions.LEARNED, embedding={"position_offset": 2}),
    model_spec(attention=QK),
    model_spec(attention={"num_kv_heads": 2, "separate_qk_norms": True, "qk_norm": norm_spec(NormKind.RMSNORM, size=8)}),
    model_spec(attention={"head_dim": 12, "rotary": None, "dense_bias": False, "separate_qk_norms": True, "norm_each_head": True, **QK}),
]


def test_parameter_count_is_the_module_s():
    for spec in SPECS:
        assert parameter_count(spec) == sum(parameter.numel() for parameter in Transformer(spec, device="meta").parameters())


@pytest.mark.parametrize("window", [None, 0, 3, 30])
def test_mean_visible(window: int | None):
    seen = [min(position, position if window is None else window) + 1 for position in range(10)]
    assert mean_visible(10, window) == pytest.approx(sum(seen) / 10)


def test_matmul_flops_are_those_that_torch_counts():
    """The eager back end forms all scores, also the masked half, so the counter sees t tokens where (t + 1) / 2 are needed."""
    length = 24
    for changes in ({}, {"num_kv_heads": 2}):
        mlp = MLPSpec(hidden_size=HIDDEN, width=40, activation="swiglu", bias=False)
        spec = model_spec(ffn=mlp, attention={"bias": False, "backend": BackendName.EAGER, **changes})
        model = Transformer(spec)
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, length, dtype=torch.int64)).full().sum().backward()
        masked = 3 * spec.num_layers * 4 * HIDDEN * (length - (length + 1) / 2)
        assert counter.get_total_flops() / length == pytest.approx(matmul_flops_per_token(spec) + masked, rel=1e-6)


def test_recomputation_costs_a_forward_of_the_blocks():
    spec = model_spec()
    head = 2.0 * HIDDEN * spec.vocab_size
    forward = matmul_flops_per_token(spec) / 3 - head
    assert matmul_flops_per_token(spec, recompute=True) == pytest.approx(4 * forward + 3 * head)


def test_reported_flops_are_the_formula_s():
    spec = model_spec(layers=2)
    b, s, h, v, layers = 8, 24, 32, 64, 2
    expected = 24 * 3 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert reported_flops_per_step(spec, batch=b, recompute=False) == pytest.approx(expected)
    assert reported_flops_per_step(spec, batch=b, recompute=True) == pytest.approx(expected * 4 / 3)
