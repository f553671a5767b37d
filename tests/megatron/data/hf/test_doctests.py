# SPDX-License-Identifier: Apache-2.0
"""The worked examples in this room's docstrings are true."""

from __future__ import annotations

import doctest

import numpy as np

from megatron.data.hf import encoders, local, record_adapters, request
from megatron.data.preprocess.encoders import Ragged


def test_examples_in_docstrings() -> None:
    for module in (encoders, local, record_adapters, request):
        found = doctest.testmod(module, extraglobs={"np": np, "Ragged": Ragged})
        assert found.failed == 0 and found.attempted > 0, module.__name__
