# SPDX-License-Identifier: Apache-2.0
"""Every back end that runs here equals the eager one; one that does not is refused with its reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron.errors import BackendError
from megatron.model.attention.backends import eager, flash_refuses, pick, refuses, sdpa, varlen_refuses
from megatron.model.attention.inputs import AttentionInputs, PackedSequences
from megatron.model.positions import distances
from megatron.model.spec import AttentionSpec, BackendName, RpeSpec

SPEC = AttentionSpec(hidden_size=16, num_heads=4, num_kv_heads=4, head_dim=4)
CPU = torch.device("cpu")


def ramp(queries: int, keys: int) -> Tensor:
    """A bias that differs between heads and distances."""
    return torch.linspace(-1, 1, 4)[:, None, None] * (distances(queries, keys, CPU) + 1).clamp(min=1).log()


SEGMENTS = [[0] * 4 + [1] * 5, [3] + [2] * 6 + [3] * 2]


@pytest.mark.parametrize("case", ["rows", "cached", "packed"])
def test_sdpa_equals_eager_with_gradients(case: str) -> None:
    documents = PackedSequences.of(torch.tensor(SEGMENTS, dtype=torch.int32)) if case == "packed" else None
    keys = 14 if case == "cached" else 9
    for kv_heads, window, bias in product((4, 2, 1), (None, 0, 3, 100), (None, ramp)):
        view = AttentionInputs(documents=documents, window=window, scale=0.4, divisor=1.0 if bias else 3.0, bias=bias)
        found = []
        for attend in (eager, sdpa):
            torch.manual_seed(1)
            q, k, v = (torch.randn(2, s, n, 4).requires_grad_() for s, n in ((9, 4), (keys, kv_heads), (keys, kv_heads)))
            out = attend(q, k, v, view)
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            found.append([out, q.grad, k.grad, v.grad])
        for ours, reference in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)


def test_decoding_one_token() -> None:
    torch.manual_seed(0)
    for kv_heads, window, bias in product((4, 2, 1), (None, 0, 2, 20), (None, ramp)):
        q, k, v = (torch.randn(2, s, n, 4) for s, n in ((1, 4), (9, kv_heads), (9, kv_heads)))
        view = AttentionInputs(window=window, scale=0.5, bias=bias)
        torch.testing.assert_close(sdpa(q, k, v, view), eager(q, k, v, view), rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    for attend in (eager, sdpa):
        views = [AttentionInputs(scale=0.5, dropout=0.3, seeds=tuple(range(2 * at, 2 * at + q.shape[2]))) for at in range(600)]
        outs = torch.stack([attend(q, k, v, view) for view in views])
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
    assert varlen_refuses(spec, torch.bfloat16) is None and flash_refuses(spec, torch.bfloat16) is None
    for broken in (replace(spec, rpe=RpeSpec()), replace(spec, head_dim=512)):
        assert varlen_refuses(broken, torch.bfloat16) and flash_refuses(broken, torch.bfloat16)
    for broken in (replace(spec, alibi=True), replace(spec, dropout=0.1)):
        assert varlen_refuses(broken, torch.bfloat16) and flash_refuses(broken, torch.bfloat16) is None
    assert varlen_refuses(spec, torch.float32) and flash_refuses(spec, torch.float32)


def test_flash_is_served_by_sdpa_where_the_package_is_absent() -> None:
    """`flash` in attention_config asks for exact fused attention, not for a package; naming the package as back end does."""
    from dataclasses import replace

    import torch

    from megatron.errors import BackendError
    from megatron.model.attention import backends
    from megatron.model.spec import AttentionSpec, BackendName

    spec = AttentionSpec(hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8, flash=True)
    here = torch.device("cpu")
    assert backends.pick(spec, here, torch.bfloat16) is backends.sdpa
    with pytest.raises(BackendError, match="runs on CUDA"):
        backends.pick(replace(spec, backend=BackendName.FLASH_ATTN), here, torch.bfloat16)
