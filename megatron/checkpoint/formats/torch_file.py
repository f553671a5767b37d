# SPDX-License-Identifier: Apache-2.0
"""Reads one torch file without running any code in it. Knows no layout of a checkpoint."""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.errors import CheckpointError

# Types a NeoX or DeepSpeed checkpoint holds besides tensors: pure data, no behaviour on construction.
_DATA_TYPES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def _numpy_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What unpickling numpy arrays (the RNG state) and numbers (a learning rate) needs, under the names of numpy 1 and 2."""
    rebuild: Any = np.zeros(1).__reduce__()[0]
    number: Any = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("?", "u1", "u4", "u8", "i4", "i8", "f2", "f4", "f8")]
    return [
        (rebuild, "numpy.core.multiarray._reconstruct"),
        (rebuild, "numpy._core.multiarray._reconstruct"),
        (number, "numpy.core.multiarray.scalar"),
        (number, "numpy._core.multiarray.scalar"),
        np.ndarray,
        np.dtype,
        *dtypes,
    ]


def _deepspeed_globals() -> list[Any]:
    """DeepSpeed's data types, where this version has them."""
    found = []
    for path in _DATA_TYPES:
        module, _, name = path.rpartition(".")
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return found


def read_torch_file(path: Path, *, deepspeed_types: bool = False) -> Any:
    """The content of a `torch.save` file, tensors on the CPU and memory-mapped where the file allows it.

    deepspeed_types: also accept DeepSpeed's optimizer bookkeeping (imports deepspeed)

    Raises CheckpointError when the file is missing, damaged, or holds anything but tensors and plain data.
    """
    allowed = _numpy_globals() + (_deepspeed_globals() if deepspeed_types else [])
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError as error:
        raise CheckpointError("checkpoint file is missing", where=str(path), fix="check the folder, or choose another step") from error
    except pickle.UnpicklingError as error:
        reason = _reason(error)
        raise CheckpointError(
            f"checkpoint file is damaged or holds objects that are not plain data: {reason}",
            where=str(path),
            fix="use a file written by this project or by GPT-NeoX; nothing in the file was executed",
        ) from error
    except Exception as error:  # a damaged pickle fails in any way: assertions, indices, unknown encodings
        raise CheckpointError(
            f"checkpoint file cannot be read: {_reason(error)}", where=str(path), fix="copy it again, or choose another step"
        ) from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _reason(error: Exception) -> str:
    """What torch has found, without its advice to read the file without care."""
    found = re.search(r"Unsupported (?:global|class|operand)[^\n]*?(?=\. Please| was not an allowed|\n|$)|GLOBAL [\w.]+", str(error))
    return found.group() if found else str(error).strip().partition("\n")[0].partition(" In PyTorch 2.6")[0].replace("`", "")
