# SPDX-License-Identifier: Apache-2.0
"""The fused projection: fusing inverts, the forward's split agrees with it, and so does every tensor parallel slice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.errors import ConfigError
from megatron.model.attention.qkv import layout
from megatron.model.spec import AttentionSpec
from megatron.mpu.sharding import split


def spec(heads: int, kv_heads: int) -> AttentionSpec:
    return AttentionSpec(hidden_size=16, num_heads=heads, num_kv_heads=kv_heads, head_dim=4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2)])
def test_fused_weight_gives_the_same_heads_as_separate_ones(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    whole = layout(spec(heads, kv_heads))
    weights = [torch.randn(size, 16) for size in whole.sizes]
    fused = whole.fuse(*weights)
    assert all(torch.equal(x, y) for x, y in zip(whole.unfuse(fused), weights, strict=True))
    bias = [torch.randn(size) for size in whole.sizes]
    assert all(torch.equal(x, y) for x, y in zip(whole.unfuse(whole.fuse(*bias)), bias, strict=True))
    hidden = torch.randn(2, 3, 16)
    for ranks in (1, 2):
        for rank in range(ranks):
            local = layout(spec(heads, kv_heads), ranks)
            found = local.split(F.linear(hidden, split(fused, whole.sharding, rank, ranks)))
            for part, weight, count in zip(found, weights, (heads, kv_heads, kv_heads), strict=True):
                expected = F.linear(hidden, weight).view(2, 3, count, 4).chunk(ranks, dim=2)[rank]
                torch.testing.assert_close(part, expected)


def test_row_order() -> None:
    q, k, v = torch.arange(8), torch.arange(8) + 100, torch.arange(8) + 200
    mha = layout(AttentionSpec(hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4))
    assert mha.fuse(q, k, v).tolist()[:12] == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]
    gqa = layout(AttentionSpec(hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4))
    assert gqa.fuse(q, k[:4], v[:4]).tolist() == [*range(8), *range(100, 104), *range(200, 204)]
    with pytest.raises(ConfigError, match="does not divide"):
        layout(spec(4, 3))
    with pytest.raises(ConfigError, match="num_kv_heads 1"):
        layout(spec(4, 1), tp_size=2)
