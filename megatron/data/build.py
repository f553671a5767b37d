# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> the train, valid and test data of this data-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron.data.blend import by_num_documents, normalise, split_bounds
from megatron.data.dataset_builder import Amount, Paths, Recipe, open_dataset, open_epochs, open_mixture
from megatron.data.fingerprint import fingerprint
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loader import DataSplit
from megatron.data.streams import MAINS, StreamKind, kind_of, main_of
from megatron.errors import ConfigError, DataError
from megatron.log import get_logger

if TYPE_CHECKING:
    from megatron.data.blend import Dataset
    from megatron.neox_arguments import NeoXArgs

log = get_logger(__name__)
NAMES = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class DataSplits:
    """The data of a run as one data-parallel rank reads it.

    valid, test: None where no samples are asked for (eval_iters 0) or no paths given
    train_iters: as configured, or what train_epochs comes to: whole global batches in the train data
    """

    train: DataSplit
    valid: DataSplit | None
    test: DataSplit | None
    train_iters: int


def build_data(
    args: NeoXArgs, *, streams: Sequence[str], rank: int = 0, size: int = 1, barrier: Callable[[], None] | None = None
) -> DataSplits:
    """Open (and where not cached, index) the data of every split.

    streams: what the objective reads: ("text",), ("text", "label"), ("pos", "neg", ...). Token, reward and reference streams must
        have paths; labels are read wherever a split has paths for them.
    rank, size: data-parallel
    barrier: waits for all ranks; given, rank 0 builds the maps first and the others find them. Without it nothing breaks: maps are written
        aside under names made of their content.
    Raises DataError for missing or damaged files, ConfigError for paths that do not go together.
    """
    if barrier is not None and rank != 0:
        barrier()
    try:
        return _build(args, streams, rank, size)
    finally:
        if barrier is not None and rank == 0:
            barrier()


def _build(args: NeoXArgs, streams: Sequence[str], rank: int, size: int) -> DataSplits:
    if args.data.dataset_impl == "online":
        raise ConfigError(
            "samples from a rollout server are not read by this objective", where="dataset_impl", fix="dataset_impl: gpt2 or pairwise"
        )
    batch_size, micro_batch_size, seq_length = args.run.train_batch_size, args.run.train_micro_batch_size_per_gpu, args.model.seq_length
    if batch_size is None or micro_batch_size is None or seq_length is None:
        raise ConfigError("the batch size and seq_length must be known before data is opened", where="train_batch_size, seq_length")
    recipe = Recipe(
        seq_length=seq_length,
        seed=args.run.seed,
        pack=args.data.pack_impl,
        allow_chopped=args.data.allow_chopped,
        map_dir=args.data.index_map_dir,
        warmup=args.data.mmap_warmup,
    )
    train_iters = args.run.train_iters
    spare = spare_steps(args)
    train = _open(args, "train", streams, recipe, None if args.run.train_epochs else ((train_iters or 0) + spare) * batch_size)
    if train is None:
        raise DataError("there is no training data", where="train_data_paths", fix="give train_data_paths (or data_path with split)")
    if args.run.train_epochs:
        train_iters = len(train) // batch_size
        log.info("train_epochs %d: %d samples, %d iterations of %d", args.run.train_epochs, len(train), train_iters, batch_size)
    needed = samples_needed(train_iters or 0, args.run.eval_interval, args.run.eval_iters, batch_size)
    train_split = DataSplit(
        name="train", dataset=train, micro_batch_size=micro_batch_size, rank=rank, size=size, num_workers=args.data.num_workers
    )
    splits: dict[str, DataSplit] = {}
    for name in ("valid", "test"):
        dataset = _open(args, name, streams, recipe, needed[name]) if needed[name] else None
        if dataset is not None:
            splits[name] = replace(train_split, name=name, dataset=dataset, wrap=True)
    return DataSplits(train=train_split, valid=splits.get("valid"), test=splits.get("test"), train_iters=train_iters or 0)


def data_fingerprint(args: NeoXArgs, *, streams: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint keeps of the data of the splits that are read, see `fingerprint`."""
    section, run = args.data, args.run
    needed = samples_needed(run.train_iters or 0, run.eval_interval, run.eval_iters, run.train_batch_size or 1)
    order: dict[str, Any] = {"seed": run.seed, "seq_length": args.model.seq_length, "pack_impl": section.pack_impl}
    if section.pack_impl != "packed":
        order["allow_chopped"] = section.allow_chopped
    if section.data_path:
        return fingerprint({"train": {"data_path": [section.data_path]}}, {**order, "split": section.split})
    if section.weight_by_num_documents:
        order["weighted_sampler_alpha"] = section.weighted_sampler_alpha
    lists: dict[str, dict[str, list[str | None]]] = {}
    for name in NAMES:
        members = member_paths(args, name, streams) if name == "train" or needed[name] else []
        if members:
            lists[name] = {_key_of(stream, name): [member[stream] for member in members] for stream in members[0]}
            order[f"{name}_data_weights"] = normalise(getattr(section, f"{name}_data_weights") or [1.0] * len(members))
    return fingerprint(lists, order)


def spare_steps(args: NeoXArgs) -> int:
    """Steps whose samples may be left out by going back to a checkpoint, and are made up for at the end."""
    run = args.run
    spikes = run.loss_spike_patience if run.loss_spike_policy == "rollback" else 0
    return run.rollback_limit * max(1 if run.nonfinite_policy == "rollback" else 0, spikes)


def samples_needed(train_iters: int, eval_interval: int | None, eval_iters: int | None, batch_size: int) -> dict[str, int]:
    """Samples each split is sized for.

    >>> samples_needed(100, 40, 5, 8)
    {'train': 800, 'valid': 120, 'test': 40}
    """
    passes = train_iters // eval_interval + 1 if eval_interval else 1
    return {"train": train_iters * batch_size, "valid": passes * (eval_iters or 0) * batch_size, "test": (eval_iters or 0) * batch_size}


def _open(args: NeoXArgs, name: str, streams: Sequence[str], recipe: Recipe, num_samples: int | None) -> Dataset | None:
    """One split's dataset; None where it has no data. num_samples None: `train_epochs` whole epochs."""
    if args.data.data_path:
        return _open_share(args, name, streams, recipe, num_samples)
    members = member_paths(args, name, streams)
    if not members:
        return None
    if num_samples is None:
        return open_epochs(name, members, recipe, args.run.train_epochs or 1)
    given = getattr(args.data, f"{name}_data_weights")
    if given is not None and len(given) != len(members):
        raise ConfigError(
            f"{len(given)} weights for {len(members)} paths", where=f"{name}_data_weights", fix="one weight per path, or none at all"
        )
    weights = normalise(given or [1.0] * len(members))
    if args.data.weight_by_num_documents:
        counts = [len(IndexedDataset(next(path for path in member.values() if path))) for member in members]
        weights = by_num_documents(counts, args.data.weighted_sampler_alpha)
        log.info("%s weights by number of documents %s: %s", name, counts, [round(weight, 4) for weight in weights])
    return open_mixture(name, members, weights, recipe, num_samples)


def _open_share(args: NeoXArgs, name: str, streams: Sequence[str], recipe: Recipe, num_samples: int | None) -> Dataset | None:
    """A split that is a range of `data_path`'s documents."""
    path = str(args.data.data_path)
    if "text" not in streams:
        raise ConfigError(
            f"data_path holds one text, not {tuple(streams)}", where="data_path", fix="give the pos_ and neg_ paths of each split"
        )
    bounds = split_bounds(args.data.split, len(IndexedDataset(path)))
    documents = (bounds[NAMES.index(name)], bounds[NAMES.index(name) + 1])
    if documents[0] == documents[1]:
        return None
    amount = Amount(samples=num_samples, epochs=args.run.train_epochs if num_samples is None else None)
    return open_dataset(name, {"text": path}, recipe, amount, documents=documents)


def member_paths(args: NeoXArgs, name: str, streams: Sequence[str]) -> list[Paths]:
    """The aligned paths of each member of a split's mixture: stream -> prefix.

    A label path may be null: all tokens of that member are then trained.
    """
    mains = [stream for stream in MAINS if stream in streams]
    if not mains:
        raise ConfigError(f"streams {tuple(streams)} hold no tokens", fix=f"ask for one of {MAINS}")
    wanted = list(dict.fromkeys([*streams, *("label" if main == "text" else f"{main}_label" for main in mains)]))
    columns: dict[str, Sequence[str | None]] = {}
    for stream in sorted(wanted, key=lambda stream: kind_of(stream) is not StreamKind.TOKENS):
        key = _key_of(stream, name)
        if kind_of(stream) is StreamKind.REF:
            columns[stream] = _reference_paths(args, [path for path in columns[main_of(stream)] if path])
            continue
        paths = getattr(args.data, key, None)
        if paths:
            columns[stream] = paths
        elif kind_of(stream) is not StreamKind.LABEL:
            if any(getattr(args.data, _key_of(main, name)) for main in mains):
                raise ConfigError(f"stream {stream} of the {name} data has no paths", where=key, fix=f"give {key}")
            return []
    lengths = {stream: len(paths) for stream, paths in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(
            f"the {name} data has paths in different numbers: {lengths}",
            where=_key_of(mains[0], name),
            fix="one path of each kind per member",
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _key_of(stream: str, name: str) -> str:
    """The YAML key that holds a stream's paths.

    >>> _key_of("text", "train"), _key_of("pos_label", "valid"), _key_of("reward", "test")
    ('train_data_paths', 'pos_valid_label_data_paths', 'test_reward_data_paths')
    """
    main = main_of(stream)
    before = "" if main == "text" else f"{main}_"
    kind = kind_of(stream)
    middle = "" if kind is StreamKind.TOKENS else f"_{kind.value}"
    return f"{before}{name}{middle}_data_paths"


def _reference_paths(args: NeoXArgs, paths: Sequence[str]) -> list[str]:
    model = args.objective.precompute_model_name
    if not model:
        raise ConfigError(
            "reference log-probs are wanted, but no files of them are named", where="precompute_model_name", fix="name the reference model"
        )
    return [f"{path}_{model}" for path in paths]
