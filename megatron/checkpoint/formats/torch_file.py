# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save: read without running code, as named tensors made on access, and written a tensor at a time."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.errors import CheckpointError

SEQUENTIAL = "sequential."
TIED = "tied_modules.embed."


class LazyState(Mapping[str, Tensor]):
    """A read-only mapping name -> tensor whose tensors are made on access and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


def canonical_name(name: str) -> str:
    """A name of the module, sequential or pipeline, as `<slot>.<parameter>`."""
    # DeepSpeed files a shared module under its key; the embedding, slot 0, is the only one.
    return re.sub(r"^(sequential\.|tied_modules\.embed\.)", lambda match: "" if match.group(1) == "sequential." else "0.", name)


def canonical_state(module: nn.Module) -> dict[str, Tensor]:
    """The stored tensors of a `Transformer` by canonical name (not copied)."""
    return {name.removeprefix(SEQUENTIAL): tensor for name, tensor in module.state_dict().items()}


def summary(names: list[str], most: int = 6, separator: str = ", ") -> str:
    """A list of names for an error message, cut after `most`."""
    if not names:
        return "none"
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
        with suppress(ImportError, AttributeError):
            found.append(getattr(importlib.import_module(module), name))
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
        what = f"checkpoint file is damaged or holds objects that are not plain data: {reason}"
        fix = "use a file written by this project or by GPT-NeoX; nothing in the file was executed"
        raise CheckpointError(what, where=str(path), fix=fix) from error
    except Exception as error:  # a damaged pickle fails in any way: assertions, indices, unknown encodings
        raise CheckpointError(
            f"checkpoint file cannot be read: {_reason(error)}", where=str(path), fix="copy it again, or choose another step"
        ) from error


def read_plain_first(path: Path) -> Any:
    """The same, with DeepSpeed's types only where the file needs them: few do, and importing DeepSpeed takes seconds."""
    try:
        return read_torch_file(path)
    except CheckpointError:
        if not path.is_file():
            raise
        return read_torch_file(path, deepspeed_types=True)


def tensor_table(path: Path, fix: str) -> dict[str, Tensor]:
    """The content of a file that holds tensors by name and nothing else. Raises CheckpointError where it does not."""
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError("not a table of tensors", where=str(path), fix=fix)
    return content


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _reason(error: Exception) -> str:
    """What torch has found, without its advice to read the file without care."""
    found = re.search(r"Unsupported (?:global|class|operand)[^\n]*?(?=\. Please| was not an allowed|\n|$)|GLOBAL [\w.]+", str(error))
    return found.group() if found else str(error).strip().partition("\n")[0].partition(" In PyTorch 2.6")[0].replace("`", "")


def tensors_in(state: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


def host_copy(state: Any, *, whole: bool) -> Any:
    """The same state with its tensors in host memory; tensors that share memory still share it, so the same file comes of it.

    whole: also copy what is in host memory already (tensors and everything else), so that the copy stays as it is
    """
    storages: dict[int, torch.UntypedStorage] = {}
    memo: dict[int, Any] = {}
    for tensor in tensors_in(state):
        if id(tensor) not in memo and (whole or tensor.device.type != "cpu"):
            memo[id(tensor)] = _on_host(tensor, storages)
    if not memo and not whole:
        return state
    if not whole:
        memo |= {id(tensor): tensor for tensor in tensors_in(state) if id(tensor) not in memo}
    if any(tensor.is_cuda for tensor in tensors_in(state)):
        torch.cuda.synchronize()  # the copies below were only asked for
    return copy.deepcopy(state, memo)


def _on_host(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A tensor over a copy of its memory, which is copied once however many tensors look at it."""
    original = tensor.untyped_storage()
    if original._cdata not in storages:
        pinned = tensor.is_cuda
        flat = torch.empty(original.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        flat.copy_(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(original), non_blocking=pinned)
        storages[original._cdata] = flat.untyped_storage()
    same = torch.empty(0, dtype=tensor.dtype).set_(storages[original._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
    # What a file also tells of a tensor.
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    same = torch.nn.Parameter(same, tensor.requires_grad) if is_parameter else same.requires_grad_(tensor.requires_grad)
    same.__dict__.update(tensor.__dict__)
    return same


@dataclass(frozen=True, kw_only=True)
class Later:
    """Stands for a tensor in what is to be written; `make` gives it, of this shape."""

    shape: Sequence[int]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def save_streaming(content: Any, path: Path) -> None:
    """Write nested dicts, lists and tuples of plain data, tensors and `Later`; on disk when this returns.

    Tensors are made in the order in which they stand in `content`, and let go when they are written.
    """
    for _ in streaming(content, path):
        pass


def streaming(content: Any, path: Path, *, plain: bool = False) -> Iterator[None]:
    """The same a tensor at a time, so that several files can be written in step.

    plain: there is nothing of DeepSpeed in it, which then need not be imported
    """
    makers: list[Callable[[], Tensor]] = []
    # A file with room for every tensor, which says where each of them belongs, and then the tensors.
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(_outline(content, makers, FakeTensorMode()), path)
    with FakeTensorMode():
        places = list(tensors_in(read_torch_file(path, deepspeed_types=not plain)))
    if len(places) != len(makers):
        raise CheckpointError(f"{len(makers)} tensors were to be written, and there is room for {len(places)}", where=str(path))
    with path.open("r+b") as file:
        for place, make in zip(places, makers, strict=True):
            _write(file, place, make())
            yield
        file.flush()
        os.fsync(file.fileno())


def _outline(content: Any, makers: list[Callable[[], Tensor]], mode: FakeTensorMode) -> Any:
    if isinstance(content, (Tensor, Later)):
        makers.append(content.make if isinstance(content, Later) else content.detach)
        with mode:
            return torch.empty(tuple(content.shape), dtype=content.dtype)
    if isinstance(content, Mapping):
        return {key: _outline(value, makers, mode) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_outline(value, makers, mode) for value in content)
    return content


def _write(file: BinaryIO, place: Tensor, tensor: Tensor) -> None:
    if tensor.shape != place.shape:
        raise CheckpointError(f"a tensor of shape {tuple(place.shape)} was to be written, and it is {tuple(tensor.shape)}")
    if tensor.numel():
        offset: Any = place.untyped_storage()._checkpoint_offset
        file.seek(int(offset))
        whole = tensor.detach().to(place.dtype).cpu().contiguous()
        file.write(whole.reshape(-1).view(torch.uint8).numpy().data)
