# SPDX-License-Identifier: Apache-2.0
"""Logits of fixed tokens, file to file, some rows at a time. Knows no checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from megatron.errors import DataError
from megatron.model.transformer import Transformer


@torch.inference_mode()
def write_logits(model: Transformer, tokens_file: Path, output: Path, *, rows: int = 1, write: bool = True) -> tuple[int, ...]:
    """tokens [b, s] integers (.npy) -> logits [b, s, v] float32 (.npy, aside and renamed); returns the shape.

    v is the padded vocabulary. All ranks that share the model call this; those with `write` False write nothing.
    Raises DataError for tokens of another shape, dtype or range.
    """
    tokens = _tokens(tokens_file, model.spec.vocab_size)
    shape = (*tokens.shape, model.spec.vocab_size)
    device = next(model.parameters()).device
    aside = output.with_name(f"{output.name}.tmp.{os.getpid()}")
    logits = None
    if write:
        output.parent.mkdir(parents=True, exist_ok=True)
        logits = open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, len(tokens), rows):
        part = torch.from_numpy(tokens[start : start + rows].astype(np.int64)).to(device)
        found = model(part, read=lambda handle: handle.full().float())
        if logits is not None:
            logits[start : start + rows] = found.cpu().numpy()
    if logits is not None:
        logits.flush()
        del logits  # closes the file before it gets its name
        aside.replace(output)
    return shape


def _tokens(path: Path, vocab_size: int) -> np.ndarray:
    fix = "save integers [b, s] with numpy.save"
    if not path.is_file():
        raise DataError(f"there is no {path}", where="--tokens", fix=fix)
    try:
        tokens = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is not a .npy file: {error}", where="--tokens", fix=fix) from error
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.size == 0:
        raise DataError(f"{path} holds {tokens.dtype} {list(tokens.shape)}", where="--tokens", fix=fix)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(f"{path} holds tokens {tokens.min()} to {tokens.max()}, not 0 to {vocab_size - 1}", where="--tokens", fix=fix)
    return np.asarray(tokens)
