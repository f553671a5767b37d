# SPDX-License-Identifier: Apache-2.0
"""Arrays kept on disk under a name made of everything they depend on, so a stale one is never read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.atomic_io import atomic_write
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)
MAPPED_BYTES = 2**20
Array = NDArray[np.integer]


def content_name(stem: str, key: Mapping[str, object]) -> str:
    """`<stem>_<16 hex digits>` of a key of plain values.

    >>> content_name("train", {"seed": 1}) == content_name("train", {"seed": 2})
    False
    """
    return f"{stem}_{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def cached_arrays(
    directory: Path, stem: str, key: Mapping[str, object], names: tuple[str, ...], build: Callable[[], Mapping[str, Array]]
) -> dict[str, Array]:
    """The arrays `names`, mapped from `<directory>/<stem>_<hash of key>_<name>.npy`; built and written first where one is missing.

    Processes that build the same arrays at the same time do no harm: each writes its own file aside and renames it, and all are equal.
    Raises DataError where the directory cannot be written.
    """
    base = content_name(stem, key)
    paths = {name: directory / f"{base}_{name}.npy" for name in names}
    found = _load(paths)
    if found is not None:
        return found
    arrays = build()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            _write(path, arrays[name])
    except OSError as error:
        raise DataError(
            f"the index map cannot be written: {error.strerror or error}",
            where=str(directory),
            fix="set index_map_dir to a folder that can be written",
        ) from error
    log.info("index map %s written to %s", base, directory)
    return {name: arrays[name] for name in names}


def _load(paths: Mapping[str, Path]) -> dict[str, Array] | None:
    if not all(path.is_file() for path in paths.values()):
        return None
    try:
        return {name: _read(path) for name, path in paths.items()}
    except (ValueError, EOFError, OSError) as error:
        log.warning("index map %s cannot be read (%s): built again", next(iter(paths.values())), error)
        return None


def _read(path: Path) -> Array:
    # Small ones are simply read: an empty array cannot be mapped.
    return np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > MAPPED_BYTES else None, allow_pickle=False))


def _write(path: Path, values: Array) -> None:
    with atomic_write(path, "wb") as file:
        np.save(file, values, allow_pickle=False)
