# SPDX-License-Identifier: Apache-2.0
"""The worked examples in this room's docstrings are true."""

from __future__ import annotations

import doctest

from megatron.data.cleaning import deduplication, document, filters, pii, words


def test_examples_in_docstrings() -> None:
    for one in (deduplication, document, filters, pii, words):
        found = doctest.testmod(one)
        assert found.failed == 0 and found.attempted > 0, one.__name__
