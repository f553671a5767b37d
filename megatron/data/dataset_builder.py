# SPDX-License-Identifier: Apache-2.0
"""One dataset from its paths: opened, checked, its index map taken from the cache or built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.atomic_io import atomic_write
from megatron.data import index_map
from megatron.data.blend import BlendedDataset, Dataset, blend_indices, normalise, samples_per_member
from megatron.data.fingerprint import blocks_of
from megatron.data.index_map import IndexMap, Ints
from megatron.data.indexed_dataset import IndexedDataset, data_file
from megatron.data.streams import MAINS, StreamDataset, StreamKind, check_aligned, kind_of
from megatron.errors import DataError
from megatron.log import get_logger

log = get_logger(__name__)
MAP_VERSION = 1
ARRAY_NAMES = ("doc_idx", "sample_idx", "shuffle_idx")
BLEND_NAMES = ("dataset_index", "dataset_sample_index")
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 4096
MAPPED_BYTES = 2**20
Paths = Mapping[str, str | None]  # stream name -> prefix of its files; None: this stream has no file here


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How documents become samples, the same for every dataset of a run.

    pack: "packed" | "pack_until_overflow" | "unpacked"
    map_dir: where index maps are kept; None: beside the data
    """

    seq_length: int
    seed: int
    pack: str = "packed"
    allow_chopped: bool = True
    map_dir: str | None = None
    warmup: bool = False


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much to read: so many samples, or so many whole epochs (packed only)."""

    samples: int | None = None
    epochs: int | None = None


def open_streams(paths: Paths, *, warmup: bool = False) -> dict[str, IndexedDataset]:
    """The streams that have files, checked against each other; the same file is opened once."""
    opened = {path: IndexedDataset(path, warmup=warmup) for path in dict.fromkeys(paths.values()) if path is not None}
    streams = {name: opened[path] for name, path in paths.items() if path is not None}
    check_aligned(streams)
    return streams


def open_dataset(name: str, paths: Paths, recipe: Recipe, amount: Amount, *, documents: tuple[int, int] | None = None) -> StreamDataset:
    """The documents (default: all) behind one set of aligned paths, as samples.

    name: of the split and member, part of the map's file name
    """
    streams = open_streams(paths, warmup=recipe.warmup)
    main = next(stream for stream in MAINS if stream in streams)
    documents = (0, len(streams[main])) if documents is None else documents
    needed = amount.samples or 0
    if recipe.pack == "packed" and amount.epochs is None:
        # The map depends on whole epochs only, so that a longer run may find the same one.
        amount = Amount(epochs=index_map.epochs_for(streams[main].sizes, documents, recipe.seq_length, needed))
    stem = f"{Path(streams[main].prefix).name}_{name}_indexmap"
    key = map_key(streams, recipe, amount, documents)
    arrays = cached_arrays(_map_directory(paths, recipe), stem, key, ARRAY_NAMES, lambda: build_map(streams, recipe, amount, documents)[:3])
    index = IndexMap(arrays[0], arrays[1], arrays[2], cut=recipe.pack == "packed")
    # Where rows are padded, or labels are wanted and this member has none, every token that is there is trained.
    wanted = {stream for stream in paths if kind_of(stream) is StreamKind.LABEL}
    if recipe.pack != "packed":
        wanted |= {"label" if stream == "text" else f"{stream}_label" for stream in streams if stream in MAINS}
    unlabelled = tuple(sorted(wanted - streams.keys()))
    # FORMAT: the last row is not read, as in earlier runs, unless the samples asked for need it.
    rows = len(index.shuffle)
    length = max(rows - 1, min(rows, needed))
    return StreamDataset(streams, index, recipe.seq_length, all_trained=unlabelled, length=length)


def build_map(streams: Mapping[str, IndexedDataset], recipe: Recipe, amount: Amount, documents: tuple[int, int]) -> IndexMap:
    """The map of one dataset, built from document lengths and, where rows are whole documents, labels."""
    mains = [streams[name] for name in MAINS if name in streams]
    sizes = np.max([dataset.sizes for dataset in mains], axis=0) if len(mains) > 1 else mains[0].sizes
    if recipe.pack == "packed":
        if len(mains) > 1:
            raise DataError(
                "pairs cannot be packed: their halves have different lengths", where="pack_impl", fix="pack_until_overflow or unpacked"
            )
        return index_map.packed(sizes, documents, recipe.seq_length, recipe.seed, num_epochs=amount.epochs or 1)
    if amount.samples is None:
        raise DataError(f"train_epochs needs pack_impl packed, not {recipe.pack}", where="train_epochs", fix="give train_iters instead")
    keep = index_map.usable(sizes, _trained(streams, recipe), recipe.seq_length, recipe.allow_chopped)
    first, last = documents
    skipped = last - first - int(np.count_nonzero(keep[first:last]))
    if skipped:
        log.info("%s: %d of %d documents skipped (empty, wholly masked or too long)", mains[0].prefix, skipped, last - first)
    if recipe.pack == "unpacked":
        return index_map.unpacked(keep, documents, recipe.seed, num_samples=amount.samples, paired=len(mains) > 1)
    return index_map.pack_until_overflow(sizes, keep, documents, recipe.seq_length, recipe.seed, num_samples=amount.samples)


def _trained(streams: Mapping[str, IndexedDataset], recipe: Recipe) -> NDArray[np.bool_] | None:
    """Documents with something to train in every token stream; None where all have."""
    result: NDArray[np.bool_] | None = None
    for name, dataset in streams.items():
        if kind_of(name) is StreamKind.LABEL:
            part = index_map.trained_documents(dataset.values, dataset.sizes, recipe.seq_length)
        elif kind_of(name) is StreamKind.TOKENS and recipe.pack == "unpacked":
            part = dataset.sizes > 1  # one token alone has no target
        else:
            continue
        result = part if result is None else result & part
    return result


def map_key(streams: Mapping[str, IndexedDataset], recipe: Recipe, amount: Amount, documents: tuple[int, int]) -> dict[str, object]:
    """Everything a map depends on, as plain values: changed inputs give another key and so another file."""
    return {
        "version": MAP_VERSION,
        "streams": {name: dataset.digest() for name, dataset in sorted(streams.items()) if kind_of(name) is StreamKind.TOKENS},
        "labels": {
            name: content_digest(data_file(dataset.prefix))
            for name, dataset in sorted(streams.items())
            if kind_of(name) is StreamKind.LABEL and recipe.pack != "packed"
        },
        "documents": documents,
        "seq_length": recipe.seq_length,
        "seed": recipe.seed,
        "pack": recipe.pack,
        "allow_chopped": recipe.allow_chopped and recipe.pack != "packed",
        "samples": amount.samples,
        "epochs": amount.epochs,
    }


def content_digest(path: Path) -> str:
    """sha256 of a file's size, time of change and some blocks spread over it: as good as its content, and quick on any size."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for block in blocks_of(file, SAMPLED_BLOCKS, BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def open_mixture(name: str, members: Sequence[Paths], weights: Sequence[float], recipe: Recipe, num_samples: int) -> Dataset:
    """`num_samples` samples of several sets of aligned paths, mixed by normalised weights."""
    if len(members) == 1:
        wanted = [num_samples]
    else:
        mixed = _blend(members[0], f"{name}_blend", weights, recipe, num_samples)
        wanted = np.bincount(mixed[0], minlength=len(members)).tolist()
    sized = samples_per_member(weights, num_samples)
    opened = [
        open_dataset(f"{name}_{number}", paths, recipe, Amount(samples=max(sized[number], wanted[number])))
        for number, paths in enumerate(members)
    ]
    return opened[0] if len(members) == 1 else BlendedDataset(opened, *mixed)


def open_epochs(name: str, members: Sequence[Paths], recipe: Recipe, epochs: int) -> Dataset:
    """Every member's documents `epochs` times, spread evenly over the whole."""
    opened = [open_dataset(f"{name}_{number}", paths, recipe, Amount(epochs=epochs)) for number, paths in enumerate(members)]
    if len(opened) == 1:
        return opened[0]
    # Shares in proportion to lengths give each member exactly its length.
    lengths = [len(dataset) for dataset in opened]
    return BlendedDataset(opened, *_blend(members[0], f"{name}_blend", normalise(lengths), recipe, sum(lengths)))


def _blend(paths: Paths, stem: str, weights: Sequence[float], recipe: Recipe, num_samples: int) -> tuple[Ints, Ints]:
    key = {"version": MAP_VERSION, "weights": list(weights), "samples": num_samples}
    members, ranks = cached_arrays(_map_directory(paths, recipe), stem, key, BLEND_NAMES, lambda: blend_indices(weights, num_samples))
    return members, ranks


def _map_directory(paths: Paths, recipe: Recipe) -> Path:
    return Path(recipe.map_dir) if recipe.map_dir else Path(next(path for path in paths.values() if path)).parent


def content_name(stem: str, key: Mapping[str, object]) -> str:
    """`<stem>_<16 hex digits>` of a key of plain values.

    >>> content_name("train", {"seed": 1}) == content_name("train", {"seed": 2})
    False
    """
    return f"{stem}_{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def cached_arrays(
    directory: Path, stem: str, key: Mapping[str, object], names: tuple[str, ...], build: Callable[[], Sequence[Ints]]
) -> Sequence[Ints]:
    """The arrays `names`, mapped from `<directory>/<stem>_<hash of key>_<name>.npy`; built and written first where one is missing.

    Processes that build the same arrays at the same time do no harm: each writes its own file aside and renames it, and all are equal.
    Raises DataError where the directory cannot be written.
    """
    base = content_name(stem, key)
    paths = [directory / f"{base}_{name}.npy" for name in names]
    if all(path.is_file() for path in paths):
        try:
            return [_read(path) for path in paths]
        except (ValueError, EOFError, OSError) as error:
            log.warning("index map %s cannot be read (%s): built again", paths[0], error)
    arrays = build()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, values in zip(paths, arrays, strict=True):
            with atomic_write(path, "wb") as file:
                np.save(file, values, allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"the index map cannot be written: {error.strerror or error}",
            where=str(directory),
            fix="set index_map_dir to a folder that can be written",
        ) from error
    log.info("index map %s written to %s", base, directory)
    return arrays


def _read(path: Path) -> Ints:
    # Small ones are simply read: an empty array cannot be mapped.
    return np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > MAPPED_BYTES else None, allow_pickle=False))
