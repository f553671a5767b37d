# SPDX-License-Identifier: Apache-2.0
"""The cache's own rules. That cached attention equals uncached is tested with the attention layer and the whole model."""

from __future__ import annotations

import pytest
import torch

from megatron.errors import NeoXError
from megatron.model.layer_state import AttentionCache, ModelCache


def test_append_keep_and_overflow() -> None:
    cache = ModelCache(AttentionCache(2, 4, 1, 3, torch.float32, "cpu") for _ in range(2))
    first, second = torch.randn(2, 3, 1, 3), torch.randn(2, 1, 1, 3)
    for layer in cache:
        layer.append(first, -first)
    keys, values = cache[1].append(second, -second)
    assert torch.equal(keys, torch.cat((first, second), 1)) and torch.equal(values, -keys)
    with pytest.raises(NeoXError, match="room for 4 tokens, not 5"):
        cache[1].append(second, second)
    cache.keep(3)
    assert [layer.longest for layer in cache] == [3, 3] and cache.lengths.tolist() == [3, 3]


def test_rows_of_different_lengths() -> None:
    cache = AttentionCache(2, 4, 1, 3, torch.float32, "cpu")
    first, second = torch.randn(2, 3, 1, 3), torch.randn(2, 1, 1, 3)
    cache.append(first, first)
    cache.keep(torch.tensor([3, 1]))
    assert cache.positions(1).tolist() == [[3], [1]] and not cache.even
    keys, _ = cache.append(second, second)
    assert torch.equal(keys[0], torch.cat((first[0], second[0]))) and torch.equal(keys[1, :2], torch.cat((first[1, :1], second[1])))
    assert cache.lengths.tolist() == [4, 2] and cache.longest == 4
    cache.keep(2)
    assert cache.even and cache.longest == 2
