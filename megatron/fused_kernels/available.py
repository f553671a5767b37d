# SPDX-License-Identifier: Apache-2.0
"""Whether an optional kernel or package can be used on this machine, and if not, why. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec
from types import MappingProxyType

import torch

from megatron.errors import BackendError

# name -> (module that must be importable, whether it needs CUDA, how to get it)
_NEEDS = MappingProxyType(
    {
        "flash_attn": ("flash_attn", True, "uv pip install flash-attn"),
        "varlen": ("torch.nn.attention.varlen", True, "install torch >= 2.10 with CUDA"),
        "transformer_engine": ("transformer_engine", True, "uv pip install transformer-engine[pytorch]"),
        "triton": ("triton", False, "uv pip install triton"),
        "apex": ("apex", True, "build NVIDIA Apex"),
    }
)


def available(name: str) -> str | None:
    """None when `name` can be used here, else the reason it cannot.

    Raises BackendError for a name nobody knows.
    """
    if name not in _NEEDS:
        raise BackendError(f"no optional kernel is called {name!r}", fix=f"one of {', '.join(sorted(_NEEDS))}")
    module, needs_cuda, fix = _NEEDS[name]
    if needs_cuda and not torch.cuda.is_available():
        return f"{name} needs a CUDA device, and torch {torch.__version__} sees none"
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"the module {module} is not installed ({fix})"
