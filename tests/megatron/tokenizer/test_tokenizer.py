# SPDX-License-Identifier: Apache-2.0
"""The padded vocabulary and the digest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import DataError
from megatron.tokenizer.tokenizer import digest_of, existing, padded_vocab_size


@given(st.integers(1, 300_000), st.integers(1, 512), st.integers(1, 64))
def test_padded_size_is_the_smallest_multiple(size: int, divisible_by: int, tp: int) -> None:
    padded = padded_vocab_size(size, divisible_by, tp)
    assert padded % (divisible_by * tp) == 0
    assert padded - divisible_by * tp < size <= padded


@pytest.mark.parametrize(
    ("size", "divisible_by", "tp", "padded"), [(50277, 128, 1, 50304), (50257, 128, 2, 50432), (32000, 1, 1, 32000), (512, 128, 1, 512)]
)
def test_published_sizes(size: int, divisible_by: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(size, divisible_by, tp) == padded


def test_digest_sees_content_and_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("b")
    assert digest_of(one, two) != digest_of(two, one)
    before = digest_of(one)
    one.write_text("c")
    assert digest_of(one) != before


def test_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        existing(tmp_path / "x", "vocab_file", kind="K", fix="do this")
    assert caught.value.where == "vocab_file" and caught.value.fix == "do this"
