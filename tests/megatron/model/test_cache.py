# SPDX-License-Identifier: Apache-2.0
"""The cache's own rules. That cached attention equals uncached is tested with the attention layer."""

from __future__ import annotations

import pytest
import torch

from megatron.errors import NeoXError
from megatron.model.cache import KVCache


def test_append_keep_reorder_and_overflow() -> None:
    cache = KVCache.allocate(2, 2, 4, 1, 3, torch.float32, "cpu")
    first, second = torch.randn(2, 3, 1, 3), torch.randn(2, 1, 1, 3)
    for layer in cache.layers:
        layer.append(first, -first)
    keys, values = cache.layer(1).append(second, -second)
    assert torch.equal(keys, torch.cat((first, second), 1)) and torch.equal(values, -keys)
    with pytest.raises(NeoXError, match="room for 4 tokens, not 5"):
        cache.layer(1).append(second, second)
    cache.keep(3)
    assert [layer.length for layer in cache.layers] == [3, 3] and cache.length == 3
    cache.reorder(torch.tensor([1, 1]))
    keys, _ = cache.layer(0).append(second, second)
    assert torch.equal(keys[0, :3], first[1]) and torch.equal(keys[1, :3], first[1])
