# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory: safetensors (or the older .bin files, read only), their index, config.json.
Knows no names' meaning and no model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.checkpoint.formats.state import LazyState
from megatron.checkpoint.formats.torch_file import read_torch_file
from megatron.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_WEIGHTS = "pytorch_model.bin"
OLD_INDEX = "pytorch_model.bin.index.json"
CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError when it is missing or damaged."""
    return read_json(directory / CONFIG, fix="give a folder that a Hugging Face model was saved to")


def read_state(directory: Path, *, empty: bool = False) -> LazyState:
    """All tensors, each read from its file on access. Raises CheckpointError when files are missing or damaged.

    empty: tensors without numbers (device "meta", float32) that have the shapes
    """
    owners: dict[str, Path] = {}
    for path in weight_files(directory):
        try:
            names = names_of(path)
        except SafetensorError as error:
            raise CheckpointError(f"damaged safetensors file: {error}", where=str(path), fix="copy it again") from error
        owners.update(dict.fromkeys(names, path))
    return LazyState({name: partial(empty_tensor if empty else read_tensor, path, name) for name, path in owners.items()})


def weight_files(directory: Path) -> list[Path]:
    """The files with the weights: safetensors, or where there are none the older .bin. Raises CheckpointError when one is missing."""
    old = not (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file()
    old = old and ((directory / OLD_INDEX).is_file() or (directory / OLD_WEIGHTS).is_file())
    index, single = (OLD_INDEX, OLD_WEIGHTS) if old else (INDEX, WEIGHTS)
    files = sorted(set(read_json(directory / index)["weight_map"].values())) if (directory / index).is_file() else [single]
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(
                f"{index} names {file}, which is not in the folder",
                where=str(directory / index),
                fix="copy the model again from its source",
            )
        if not (directory / file).is_file():
            fix = "copy all files of the model (save_pretrained writes safetensors)"
            raise CheckpointError(f"{file} is missing", where=str(directory), fix=fix)
    return [directory / file for file in files]


def names_of(path: Path) -> list[str]:
    """The tensors of one file."""
    if path.suffix == ".bin":
        return list(_old_content(path))
    with safe_open(path, framework="pt") as reader:
        return list(reader.keys())


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of one file."""
    if path.suffix == ".bin":
        return _old_content(path)[name]
    with safe_open(path, framework="pt") as reader:
        tensor: Tensor = reader.get_tensor(name)
    return tensor


def empty_tensor(path: Path, name: str) -> Tensor:
    """The shape of one tensor of one file."""
    if path.suffix == ".bin":
        return torch.empty(_old_content(path)[name].shape, device="meta")
    with safe_open(path, framework="pt") as reader:
        return torch.empty(reader.get_slice(name).get_shape(), device="meta")


def _old_content(path: Path) -> dict[str, Tensor]:
    # Opened anew for each tensor: what is mapped into memory goes when the tensor is done.
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError("not a table of tensors", where=str(path), fix="give a model as save_pretrained wrote it")
    return content


def write_model(directory: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors and config, one shard in memory at a time, each file aside and renamed; config.json comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = f"tmp.{os.getpid()}"
    sizes: list[int] = []
    names: list[list[str]] = []
    for index, shard in enumerate(shards(state, shard_bytes)):
        save_file(shard, directory / f"{index}.{aside}", metadata={"format": "pt"})
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in shard.values()))
        names.append(list(shard))
    files = [WEIGHTS] if len(names) == 1 else [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    for index, file in enumerate(files):
        (directory / f"{index}.{aside}").replace(directory / file)
    if len(files) > 1:
        table = {name: file for file, held in zip(files, names, strict=True) for name in held}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": table})
    else:
        (directory / INDEX).unlink(missing_ok=True)
    write_json(directory / CONFIG, config)


def shards(state: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in order, in groups of at most `limit` bytes (a larger tensor stands alone)."""
    held: dict[str, Tensor] = {}
    size = 0
    for name in state:
        tensor = state[name].detach().cpu().clone()  # safetensors refuses views that share memory
        count = tensor.numel() * tensor.element_size()
        if held and size + count > limit:
            yield held
            held, size = {}, 0
        held[name] = tensor
        size += count
    if held:
        yield held


def read_json(path: Path, fix: str = "copy it again") -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing", where=str(path.parent), fix=fix) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}", where=str(path), fix=fix) from error
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object, aside and renamed."""
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
