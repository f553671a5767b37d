# SPDX-License-Identifier: Apache-2.0
"""A folder of raw LLaMA weights: params.json and consolidated.NN.pth, each with a slice of most tensors. Knows no names of ours."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.formats.hf_files import read_json
from megatron.checkpoint.formats.torch_file import LazyState, read_torch_file
from megatron.errors import CheckpointError

PARAMS = "params.json"
_SHARD = re.compile(r"^consolidated\.(\d+)\.pth$")
_ROWS = re.compile(r"(\.attention\.w[qkv]|\.feed_forward\.w[13]|^output)\.weight$")
_COLUMNS = re.compile(r"(\.attention\.wo|\.feed_forward\.w2)\.weight$")
_EMBEDDING = "tok_embeddings.weight"


def shard_files(directory: Path) -> list[Path]:
    """The files in order. Raises CheckpointError when there is none, or one is missing between others."""
    found = {int(m.group(1)): path for path in directory.iterdir() if (m := _SHARD.match(path.name))} if directory.is_dir() else {}
    absent = [f"consolidated.{number:02d}.pth" for number in range(max(found, default=0) + 1) if number not in found]
    if absent:
        fix = "give the folder with params.json and all consolidated.NN.pth"
        raise CheckpointError(f"{absent[0]} is missing", where=str(directory), fix=fix)
    return [found[number] for number in range(len(found))]


def read_meta(directory: Path) -> tuple[dict[str, Any], LazyState]:
    """params.json with the vocabulary's size filled in, and all tensors, joined from their slices on access.

    Raises CheckpointError when files are missing or damaged, or together do not have the sizes that params.json says.
    """
    params = read_json(directory / PARAMS, fix="give the folder with params.json and all consolidated.NN.pth")
    files = shard_files(directory)
    shards = [{name: tensor.shape for name, tensor in _content(path).items()} for path in files]
    dims: dict[str, int | None] = {}
    for number, shard in enumerate(shards):
        if odd := sorted(set(shard) ^ set(shards[0])):
            raise CheckpointError(f"{files[0].name} and {files[number].name} hold different tensors: {odd[:6]}", where=str(directory))
    for name, shape in shards[0].items():
        dims[name] = _slice_dim(name, shape, params["dim"])
    _check_sizes(params, shards, dims, directory)
    if params.get("vocab_size", -1) < 0:
        rows = shards[0][_EMBEDDING][0]
        params["vocab_size"] = rows * len(files) if dims[_EMBEDDING] == 0 else rows
    return params, LazyState({name: partial(_joined, files, name, dim) for name, dim in dims.items()})


def _slice_dim(name: str, shape: torch.Size, width: int) -> int | None:
    """The dimension along which a tensor is spread over the files; None = each has all of it."""
    if name == _EMBEDDING:
        return 0 if shape[1] == width else 1  # LLaMA 3 spreads the vocabulary, its forerunners the features
    if _ROWS.search(name):
        return 0
    return 1 if _COLUMNS.search(name) else None


def _check_sizes(params: dict[str, Any], shards: list[dict[str, torch.Size]], dims: dict[str, int | None], directory: Path) -> None:
    """A missing last file, or one of another model, shows in the sums of sizes."""
    heads, width = params["n_heads"], params["dim"]
    kv = (params.get("n_kv_heads") or heads) * (width // heads)
    wanted = {"wq": width, "wk": kv, "wv": kv, "wo": width}
    for name, dim in dims.items():
        size = wanted.get(name.split(".")[-2]) if dim is not None else None
        found = None if dim is None else sum(shard[name][dim] for shard in shards)
        if size is not None and found != size:
            what = f"{name} has {found} {('rows', 'columns')[dim or 0]} in {len(shards)} files, and {size} by {PARAMS}"
            raise CheckpointError(what, where=str(directory), fix="copy all consolidated.NN.pth of one model")


def _joined(files: list[Path], name: str, dim: int | None) -> Tensor:
    """One tensor. Files are opened for it alone: what is mapped into memory goes when it is done."""
    if dim is None or len(files) == 1:
        return _content(files[0])[name]
    return torch.cat([_content(path)[name] for path in files], dim)


def _content(path: Path) -> dict[str, Tensor]:
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError("not a table of tensors", where=str(path), fix="give raw weights of LLaMA as Meta publishes them")
    return content
