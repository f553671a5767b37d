# SPDX-License-Identifier: Apache-2.0
"""What a run's data is: size and digest of every file, and what decides the order of samples. Two are compared at a resume.

A file is known by its name and its place in the list, not by its folder: data may move. Files up to WHOLE bytes are hashed whole; of
larger ones BLOCKS blocks spread evenly from the first to the last, so that a change between two of them is not seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.errors import DataError

WHOLE = 64 << 20
# Of a run with more data than this, only files up to SMALL bytes are hashed whole: a start should take seconds.
PLENTY = 2 << 30
SMALL = 1 << 20
BLOCKS = 66
BLOCK_BYTES = 1 << 16
THREADS = 8
KINDS = ("bin", "idx")
NOTHING = "-"  # name of a place in a list that has no file (labels of a member that has none)
Lists = Mapping[str, Mapping[str, Sequence[str | None]]]  # split ("train", ...) -> YAML key -> prefixes, in their order


def fingerprint(lists: Lists, order: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values that tell this data from any other.

    order: what else decides which sample comes when (seed, weights, sequence length, ...)
    Raises DataError for a file that cannot be read.
    """
    prefixes = sorted({prefix for split in lists.values() for paths in split.values() for prefix in paths if prefix})
    files = {(prefix, kind): Path(f"{prefix}.{kind}") for prefix in prefixes for kind in KINDS}
    try:
        known = dict(zip(files, sizes_and_digests(list(files.values())), strict=True))
    except OSError as error:
        raise DataError(f"a data file cannot be read: {error.strerror}", where=str(error.filename), fix="check path and rights") from error

    def entry(prefix: str | None) -> dict[str, Any]:
        if not prefix:
            return {"name": NOTHING}
        return {"name": Path(prefix).name, **{kind: known[prefix, kind] for kind in KINDS}}

    found = {split: {key: [entry(prefix) for prefix in paths] for key, paths in members.items()} for split, members in lists.items()}
    return {"files": found, "order": dict(order)}


def sizes_and_digests(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """`bytes` and `digest` of each file; of large files, or where there is much, the digest is one of blocks."""
    sizes = [path.stat().st_size for path in paths]
    limit = WHOLE if sum(min(size, WHOLE) for size in sizes) <= PLENTY else SMALL
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda path, size: digest_of(path, whole=size <= limit), paths, sizes))
    return [{"bytes": size, "digest": digest} for size, digest in zip(sizes, digests, strict=True)]


def digest_of(path: Path, *, whole: bool) -> str:
    """`method:hex`, where the method is sha256 of all bytes, or of blocks spread over the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if whole:
            while block := file.read(1 << 20):
                digest.update(block)
            return f"sha256:{digest.hexdigest()}"
        for block in blocks_of(file, BLOCKS, BLOCK_BYTES):
            digest.update(block)
    return f"sha256-of-{BLOCKS}x{BLOCK_BYTES}:{digest.hexdigest()}"


def blocks_of(file: IO[bytes], number: int, size: int) -> Iterator[bytes]:
    """That many blocks of a file, spread evenly from its first byte to its last; they overlap where it is small."""
    last = max(file.seek(0, os.SEEK_END) - size, 0)
    for start in np.linspace(0, last, number, dtype=np.int64).tolist():
        file.seek(start)
        yield file.read(size)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another in `now`, one sentence each, naming file or key; empty where the data is the same."""
    found = []
    files_before, files_now = before.get("files", {}), now.get("files", {})
    # A split that is not read, now or then (eval_iters 0), is not compared.
    for split in (name for name in files_now if name in files_before):
        for key in sorted({*files_before[split], *files_now[split]}):
            found += _of_list(key, files_before[split].get(key, []), files_now[split].get(key, []))
    order_before, order_now = before.get("order", {}), now.get("order", {})
    # What an older record does not hold cannot be compared.
    for key in sorted({*order_before} & {*order_now}):
        if order_before[key] != order_now[key]:
            found.append(f"{key}: {order_before[key]} in the checkpoint, {order_now[key]} now")
    return found


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Raise DataError when a run would go on with other data than it began with."""
    found = differences(before, now)
    if found:
        raise DataError(
            "the data is not what it was when the checkpoint was written: " + "; ".join(found),
            where=where,
            fix="restore the data and the keys named, or set `allow_data_change: true` to go on with what there is now, at the same"
            " number of samples",
        )


def _of_list(key: str, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    names_before, names_now = [entry["name"] for entry in before], [entry["name"] for entry in now]
    if names_before != names_now:
        if sorted(names_before) == sorted(names_now):
            return [f"{key}: the files are in another order, {_listed(names_before)} in the checkpoint, {_listed(names_now)} now"]
        return [f"{key}: {_listed(names_before)} in the checkpoint, {_listed(names_now)} now"]
    found = []
    for place, (old, new) in enumerate(zip(before, now, strict=True)):
        for kind in KINDS:
            if kind not in old or kind not in new:
                continue
            name = f"{key}[{place}]: {new['name']}.{kind}"
            if old[kind]["bytes"] != new[kind]["bytes"]:
                found.append(f"{name} is {new[kind]['bytes']:,} bytes long, and was {old[kind]['bytes']:,}")
                continue
            (method, _, before_hex), (same_method, _, now_hex) = (entry[kind]["digest"].partition(":") for entry in (old, new))
            if method == same_method and before_hex != now_hex:
                found.append(f"{name} has another content")
    return found


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
