# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint: names, shapes, numbers, and how two differ. Files are opened one at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint.formats.hf_files import tensor_makers
from megatron.checkpoint.formats.neox_files import LAYER, MODEL, PARTITION
from megatron.checkpoint.formats.torch_file import LazyState, read_plain_first
from megatron.checkpoint.steps.step_dirs import find_tag, saved_steps, step_tag
from megatron.errors import CheckpointError

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
BLOCK = 2**22
"""Elements of a tensor that are looked at at once, in double precision."""

Content = Mapping[str, Any]
"""Name -> tensor or plain value; nested names are joined by `/`, and a file's tensors are read on access."""


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """Of the finite elements; the two shares are of all elements."""

    min: float
    max: float
    mean: float
    std: float
    norm: float
    zeros: float
    not_finite: float


@dataclass(frozen=True, kw_only=True)
class CheckpointDiff:
    """One name on which two checkpoints do not agree.

    kind:    "only in the first", "only in the second", "shape", "dtype" or "value"
    max_abs: largest difference of an element, for numbers of one shape
    """

    name: str
    kind: str
    first: str
    second: str
    max_abs: float | None = None


def locate(path: Path, iteration: int | None = None) -> dict[str, Path]:
    """Files to read by their name in the checkpoint: of one file, of a step's folder, or of a folder of steps.

    Raises CheckpointError when there is none.
    """
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise CheckpointError("there is no such file or folder", where=str(path), fix="give a checkpoint's folder or one of its files")
    folder = step_folder(path, iteration)
    files = {entry.relative_to(folder).as_posix(): entry for entry in folder.rglob("*") if entry.suffix in SUFFIXES and entry.is_file()}
    if files:
        return dict(sorted(files.items()))
    if (folder / ".metadata").exists():
        what = "a folder of torch.distributed.checkpoint: its .metadata is a pickle, which could run anything, and is not read"
        fix = "turn it into a .pt file where you trust it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE"
        raise CheckpointError(what, where=str(folder / ".metadata"), fix=fix)
    raise CheckpointError(f"no checkpoint file ({', '.join(SUFFIXES)}) is in the folder", where=str(folder), fix="check the path")


def step_folder(path: Path, iteration: int | None = None) -> Path:
    """The folder of one step that `path` and `iteration` mean; `path` itself when it holds files."""
    if iteration is not None:
        return path if path.name == step_tag(iteration) else path / find_tag(path, iteration)
    if saved_steps(path) or (path / "latest").is_file():
        return path / find_tag(path)
    return path


def layout(files: Mapping[str, Path]) -> str:
    """Over which ranks a checkpoint is spread, going by its file names.

    >>> layout(dict.fromkeys(["layer_00-model_01-model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"], Path()))
    'weights by layer, tensor ranks: 2; optimizer shards, data ranks: 2'
    """
    layers = [int(m["tensor"]) for name in files if (m := LAYER.match(name))]
    ranks = [int(m["model"]) for name in files if (m := MODEL.match(name))]
    shards = [int(m["data"]) for name in files if (m := PARTITION.match(name))]
    parts = []
    if layers:
        parts.append(f"weights by layer, tensor ranks: {max(layers) + 1}")
    elif ranks:
        parts.append(f"weights by rank, tensor ranks: {max(ranks) + 1}")
    if any((m := MODEL.match(name)) and m["data"] for name in files):
        parts.append("weights partitioned (ZeRO 3)")
    if shards:
        parts.append(f"optimizer shards, data ranks: {max(shards) + 1}")
    return "; ".join(parts) or f"{len(files)} file{'s' if len(files) > 1 else ''}"


def read(path: Path) -> Content:
    """The content of one file, by flat names. Nothing in the file is executed. Raises CheckpointError."""
    if path.suffix != ".safetensors":
        return dict(flatten(read_plain_first(path)))
    return LazyState(tensor_makers(path))


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor or plain value) of everything inside `value`, in order.

    >>> dict(flatten({"a": {"b": 1}, "c": [2, {"d": 3}], "e": [4, 5]}))
    {'a/b': 1, 'c/0': 2, 'c/1/d': 3, 'e': [4, 5]}
    """
    inside: Iterator[tuple[Any, Any]]
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield name, torch.from_numpy(np.ascontiguousarray(value))
        return
    if isinstance(value, Mapping) and value:
        inside = iter(value.items())
    elif isinstance(value, (list, tuple)) and any(_deep(item) for item in value):
        inside = iter(enumerate(value))
    elif not isinstance(value, (Tensor, Enum, type)) and getattr(value, "__dict__", None):
        inside = iter(vars(value).items())  # DeepSpeed's loss scaler and fragment addresses
    else:
        yield name, value
        return
    for key, item in inside:
        yield from flatten(item, f"{name}/{key}" if name else str(key))


def _deep(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, Mapping, list, tuple)) and not isinstance(value, torch.Size) or hasattr(value, "__dict__")


def kind(value: Any, width: int = 60) -> str:
    """A value in a few words: dtype and shape of a tensor, else its text.

    >>> kind(torch.zeros(2, 3)), kind(8)
    ('float32 [2, 3]', '8')
    """
    if isinstance(value, Tensor):
        return f"{_dtype(value)} {list(value.shape)}"
    text = repr(tuple(value) if isinstance(value, torch.Size) else value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def statistics(tensor: Tensor) -> TensorStatistics:
    """Numbers about a tensor of any shape; it is looked at block by block (Chan et al., 1979, for the deviation)."""
    low, high, count, mean, spread, zeros = math.inf, -math.inf, 0, 0.0, 0.0, 0
    total = tensor.numel()
    for block in _blocks(tensor):
        zeros += block.numel() - int(torch.count_nonzero(block))
        finite = torch.isfinite(block)
        block = block if bool(finite.all()) else block[finite]
        n = block.numel()
        if n == 0:
            continue
        least, most = torch.aminmax(block)
        low, high = min(low, float(least)), max(high, float(most))
        variance, average = torch.var_mean(block, correction=0)
        step = float(average) - mean
        spread += float(variance) * n + step * step * count * n / (count + n)
        mean += step * n / (count + n)
        count += n
    if count == 0:
        low = high = mean = spread = math.nan
    return TensorStatistics(
        min=low,
        max=high,
        mean=mean,
        std=math.sqrt(spread / count) if count else math.nan,
        norm=math.sqrt(spread + count * mean * mean) if count else math.nan,
        zeros=zeros / total if total else 0.0,
        not_finite=(total - count) / total if total else 0.0,
    )


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    for start in range(0, flat.numel(), BLOCK):
        yield flat[start : start + BLOCK].to(torch.float64)


def max_abs_difference(first: Tensor, second: Tensor) -> float:
    """Largest difference of an element; NaN equals NaN, and differs infinitely from everything else. Of one shape."""
    if first.dtype == second.dtype and torch.equal(first, second):
        return 0.0
    largest = 0.0
    for a, b in zip(_blocks(first), _blocks(second), strict=True):
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        largest = max(largest, float(gap.nan_to_num(nan=math.inf).max()))
    return largest


def compare(name: str, first: Any, second: Any) -> CheckpointDiff | None:
    """How two values of one name differ; None when they do not."""
    of_name = partial(CheckpointDiff, name=name, first=kind(first), second=kind(second))
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        equal = not isinstance(first, Tensor) and not isinstance(second, Tensor) and _plain_equal(first, second)
        return None if equal else of_name(kind="value")
    if first.shape != second.shape:
        return of_name(kind="shape")
    gap = max_abs_difference(first, second)
    if first.dtype != second.dtype:
        return of_name(kind="dtype", max_abs=gap)
    return of_name(kind="value", max_abs=gap) if gap > 0 else None


def _plain_equal(first: Any, second: Any) -> bool:
    same = first == second
    return bool(np.all(same)) if isinstance(same, np.ndarray) else bool(same) or repr(first) == repr(second)


@dataclass(frozen=True, kw_only=True)
class TensorSelection:
    """What of a checkpoint is looked at.

    pattern: only names in which this regular expression is found
    under:   only names that begin with one of these
    tensors: no plain values
    """

    pattern: str = ""
    under: tuple[str, ...] = ()
    tensors: bool = False

    def takes(self, file: str, name: str, value: Any = None) -> bool:
        """Whether a value is among them."""
        if self.under and not any(name == start or name.startswith(f"{start}/") for start in self.under):
            return False
        if self.tensors and value is not None and not isinstance(value, Tensor):
            return False
        return re.search(self.pattern, f"{file}/{name}") is not None


def entries(files: Mapping[str, Path], wanted: TensorSelection) -> Iterator[tuple[str, str, Any]]:
    """(file, name, value) of everything wanted, one file after the other."""
    for file, path in files.items():
        content = read(path)
        for name in content:
            if wanted.takes(file, name) and wanted.takes(file, name, value := content[name]):
                yield file, name, value


def differences(first: Mapping[str, Path], second: Mapping[str, Path], wanted: TensorSelection) -> Iterator[CheckpointDiff]:
    """Where two checkpoints differ; files of one name are compared, and two single files whatever their names."""
    if len(first) == len(second) == 1:
        second = dict(zip(first, second.values(), strict=True))
    for file in sorted({*first, *second}):
        contents = [read(files[file]) if file in files else {} for files in (first, second)]
        for name in dict.fromkeys([*contents[0], *contents[1]]):
            if not wanted.takes(file, name):
                continue
            held = [content[name] for content in contents if name in content]
            if not any(wanted.takes(file, name, value) for value in held):
                continue
            full = f"{file}/{name}"
            if len(held) == 2:
                found = compare(full, *held)
                if found is not None:
                    yield found
            elif name in contents[0]:
                yield CheckpointDiff(name=full, kind="only in the first", first=kind(held[0]), second="-")
            else:
                yield CheckpointDiff(name=full, kind="only in the second", first="-", second=kind(held[0]))


def as_row(file: str, name: str, value: Any, *, numbers: bool) -> dict[str, Any]:
    """One entry as plain data for JSON; numbers that JSON lacks become null."""
    row: dict[str, Any] = {"file": file, "name": name}
    if not isinstance(value, Tensor):
        plain = isinstance(value, (str, int, bool, type(None))) or (isinstance(value, float) and math.isfinite(value))
        return row | {"value": value if plain else kind(value, width=2000)}
    row |= {"shape": list(value.shape), "dtype": _dtype(value)}
    if numbers:
        row |= {key: number if math.isfinite(number) else None for key, number in asdict(statistics(value)).items()}
    return row
