# SPDX-License-Identifier: Apache-2.0
"""The digest of a tensor tells every change of one element, and the majority tells whose it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.hooks import replicas
from megatron.hooks.replicas import digest, odd_ones
from megatron.mpu.groups import Group

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(place=st.integers(0, 34), bit=st.integers(0, 7))
def test_every_bit_counts_and_its_place(dtype: torch.dtype, place: int, bit: int) -> None:
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = tensor.clone()
    assert digest(other) == digest(tensor)
    other.view(-1).view(torch.uint8)[place * tensor.element_size() + place % tensor.element_size()] ^= 1 << bit
    assert digest(other) != digest(tensor)
    assert digest(tensor.flip(0)) != digest(tensor)


def test_it_does_not_depend_on_how_much_is_looked_at_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    numbers = [int(bits) * (2 * place + 1) for place, bits in enumerate(tensor.view(torch.int32))]
    whole = (sum(numbers) + 2**63) % 2**64 - 2**63
    for chunk in (1 << 20, 1000, 64, 7):
        monkeypatch.setattr(replicas, "CHUNK", chunk)
        assert int(digest(tensor)) == whole
    assert int(digest(torch.zeros(0))) == 0


def test_the_majority_is_right() -> None:
    group = Group(rank=0, size=3, handle=None, ranks=(4, 6, 8))
    digests = torch.tensor([[1, 7, 1], [1, 7, 2], [1, 9, 3]])
    assert odd_ones(["a", "b", "c"], digests, group, "replica") == [
        "b on rank 8 is not what it is on the other 2 replica ranks",
        "c is not the same on the replica ranks 4, 6, 8, and no value has a majority",
    ]
