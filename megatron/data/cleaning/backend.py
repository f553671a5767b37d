# SPDX-License-Identifier: Apache-2.0
"""The door to datatrove. Knows only whether it is there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from megatron.errors import BackendError


def datatrove() -> Any:
    """The module that wraps datatrove. Raises BackendError naming the extra."""
    if importlib.util.find_spec("datatrove") is None:
        raise BackendError("cleaning runs on the package datatrove, which is not installed", fix="uv pip install 'megatron-neox[clean]'")
    return importlib.import_module("megatron.data.cleaning.datatrove_adapter")
