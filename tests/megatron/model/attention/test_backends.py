# SPDX-License-Identifier: Apache-2.0
"""Every back end that runs here equals the eager one; one that does not is refused with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.errors import BackendError
from megatron.model.attention import flash, varlen
from megatron.model.attention.backends import View, eager, pick, refuses, sdpa
from megatron.model.attention.masks import Documents
from megatron.model.positions import distances
from megatron.model.spec import AttentionSpec, BackendName, RpeSpec

SPEC = AttentionSpec(hidden_size=16, num_heads=4, num_kv_heads=4, head_dim=4)
CPU = torch.device("cpu")


def ramp(queries: int, keys: int) -> Tensor:
    """A bias that differs between heads and distances."""
    return torch.linspace(-1, 1, 4)[:, None, None] * (distances(queries, keys, CPU) + 1).clamp(min=1).log()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("cached", [0, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_equals_eager_with_gradients(kv_heads: int, cached: int, packed: bool) -> None:
    torch.manual_seed(0)
    segments = torch.tensor([[0] * 4 + [1] * 5, [3] + [2] * 6 + [3] * 2], dtype=torch.int32)
    documents = Documents.of(segments) if packed and not cached else None
    for window in (None, 0, 3, 100):
        for bias in (None, ramp):
            view = View(documents=documents, window=window, scale=0.4, divisor=1.0 if bias else 3.0, bias=bias)
            found = []
            for attend in (eager, sdpa):
                torch.manual_seed(1)
                q, k, v = (torch.randn(2, s, n, 4) for s, n in ((9, 4), (9 + cached, kv_heads), (9 + cached, kv_heads)))
                leaves = [x.requires_grad_() for x in (q, k, v)]
                out = attend(*leaves, view)
                (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
                found.append([out, *(x.grad for x in leaves)])
            for ours, reference in zip(found[1], found[0], strict=True):
                torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)
    for window in (None, 2):  # decoding one token
        q, k, v = (torch.randn(2, s, n, 4) for s, n in ((1, 4), (9, kv_heads), (9, kv_heads)))
        view = View(window=window, scale=0.5)
        torch.testing.assert_close(sdpa(q, k, v, view), eager(q, k, v, view), rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    for attend in (eager, sdpa):
        outs = torch.stack([attend(q, k, v, View(scale=0.5, dropout=0.3)) for _ in range(600)])
        assert outs.std(0).max() > 0.1
        assert (outs.mean(0) - 1).abs().max() < 0.12


def test_an_absent_back_end_is_an_error_that_names_the_reason() -> None:
    assert pick(SPEC, CPU, torch.float32) is sdpa
    assert pick(replace(SPEC, backend=BackendName.EAGER), CPU, torch.float32) is eager
    for name in (BackendName.VARLEN, BackendName.FLASH_ATTN):
        assert refuses(name, SPEC, CPU, torch.bfloat16) == f"{name.value} runs on CUDA, not on cpu"
        with pytest.raises(BackendError, match="runs on CUDA, not on cpu"):
            pick(replace(SPEC, backend=name), CPU, torch.bfloat16)
    spec = replace(SPEC, head_dim=64)
    assert varlen.refuses(spec, torch.bfloat16) is None and flash.refuses(spec, torch.bfloat16) is None
    for broken in (replace(spec, rpe=RpeSpec()), replace(spec, head_dim=512)):
        assert varlen.refuses(broken, torch.bfloat16) and flash.refuses(broken, torch.bfloat16)
    for broken in (replace(spec, alibi=True), replace(spec, dropout=0.1)):
        assert varlen.refuses(broken, torch.bfloat16) and flash.refuses(broken, torch.bfloat16) is None
    assert varlen.refuses(spec, torch.float32) and flash.refuses(spec, torch.float32)
