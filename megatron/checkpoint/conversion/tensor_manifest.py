# SPDX-License-Identifier: Apache-2.0
"""What a conversion has read or written, tensor by tensor, with digests, and how far it is. Knows no names' meaning."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.atomic_io import new_digest
from megatron.checkpoint.formats.hf_files import read_json, write_json
from megatron.log import get_logger
from megatron.provenance import code_version

log = get_logger(__name__)

RECORD = "conversion.json"
EVERY_S = 10.0


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """As configuration files call it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


class ByteProgress:
    """How much of a known number of bytes is done: a bar on a terminal, a log line now and then elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, max(1, total), 0
        self._begun = self._told = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False)

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told > EVERY_S:
            self._told = time.monotonic()
            log.info("%s: %.1f of %.1f GB (%d %%)", self._title, self._done / 1e9, self._total / 1e9, 100 * self._done // self._total)

    def close(self) -> None:
        """The end, with the speed."""
        if self._bar is not None:
            self._bar.close()
        spent = max(1e-9, time.monotonic() - self._begun)
        log.info("%s: %.2f GB in %.1f s (%.0f MB/s)", self._title, self._done / 1e9, spent, self._done / 1e6 / spent)


class Table:
    """Name -> shape, dtype and XXH3-128 digest of each Hugging Face tensor that went through."""

    def __init__(self, progress: ByteProgress) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.progress = progress

    def add(self, name: str, tensor: Tensor) -> memoryview:
        """Note a tensor; returns its bytes."""
        content = content_of(tensor)
        digest = new_digest()
        digest.update(content)
        self.rows[name] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype), "xxh128": digest.hexdigest()}
        self.progress.add(len(content))
        return content


class Noted(Mapping[str, Tensor]):
    """A lazy state whose tensors are noted when they are read for the first time."""

    def __init__(self, source: Mapping[str, Tensor], table: Table) -> None:
        self._source, self._table = source, table

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source[name]
        if name not in self._table.rows:
            self._table.add(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def write_record(folder: Path, facts: Mapping[str, Any], table: Table) -> None:
    """conversion.json: what was made of what, when, by which code, and every tensor with its digest."""
    facts = {**facts, "code_version": code_version(), "converted_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_json(folder / RECORD, {**facts, "tensors": table.rows})


def read_record(folder: Path) -> dict[str, Any]:
    """The conversion.json of a folder; empty where there is none."""
    return read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
