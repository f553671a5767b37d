# SPDX-License-Identifier: Apache-2.0
"""The worked examples in this room's docstrings are true."""

from __future__ import annotations

import doctest

import numpy as np

from megatron.data import blend, build, dataset_builder, index_map, loader, streams
from megatron.data.inspect import inspecting, lengths, merging
from megatron.data.preprocess import blocks, encoders, inputs

MODULES = (
    *(blend, build, dataset_builder, index_map, loader, streams),
    *(inspecting, lengths, merging),
    *(blocks, encoders, inputs),
)


def test_examples_in_docstrings() -> None:
    for module in MODULES:
        found = doctest.testmod(module, extraglobs={"np": np})
        assert found.failed == 0 and found.attempted > 0, module.__name__
