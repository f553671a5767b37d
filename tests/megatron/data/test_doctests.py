# SPDX-License-Identifier: Apache-2.0
"""The worked examples in this room's docstrings are true."""

from __future__ import annotations

import doctest

import numpy as np

from megatron.data import blend, build, cache, index_map, indexed_dataset, sampler, skipping, streams, weights
from megatron.data.inspect import inspecting, lengths, merging
from megatron.data.preprocess import blocks, encoders, inputs

MODULES = (
    *(blend, build, cache, index_map, indexed_dataset, sampler, skipping, streams, weights),
    *(inspecting, lengths, merging),
    *(blocks, encoders, inputs),
)


def test_examples_in_docstrings() -> None:
    for module in MODULES:
        found = doctest.testmod(module, extraglobs={"np": np})
        assert found.failed == 0 and (found.attempted > 0 or module is not sampler), module.__name__
