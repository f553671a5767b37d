# SPDX-License-Identifier: Apache-2.0
"""Rules about data paths, mixtures and objectives. Opens no file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..problems import Problem, shown
from ..resolve import parse_split
from .rule import Rule, Values, simple

SPLITS: Final = ("train", "valid", "test")
SIDES: Final = ("", "pos_", "neg_")


def _paths(v: Values, side: str, split: str, role: str = "") -> list[str] | None:
    found: list[str] | None = v.get(f"{side}{split}{role}_data_paths")
    return found


def _one_source(v: Values) -> Iterable[Problem]:
    for side in SIDES:
        for split in SPLITS:
            key = f"{side}{split}_data_paths"
            if v["data_path"] is not None and v[key]:
                yield Problem(
                    f"data_path and {key} are two ways to name the data",
                    fix=f"keep data_path with split, or {key} and its like",
                    keys=(key, "data_path"),
                )


def _empty(v: Values) -> Iterable[Problem]:
    for side in SIDES:
        for split in SPLITS:
            for role in ("", "_label", "_reward"):
                key = f"{side}{split}{role}_data_paths"
                if v.get(key) == []:
                    yield Problem(f"{key} is an empty list", fix="name at least one prefix, or leave the key out", keys=(key,))


def _train_first(v: Values) -> Iterable[Problem]:
    for side in ("", "pos_"):
        for split in ("valid", "test"):
            key, train = f"{side}{split}_data_paths", f"{side}train_data_paths"
            if v[key] and not v[train] and v["train_iters"] != 0 and v["dataset_impl"] != "online":
                yield Problem(f"{key} is set, but {train} is not", fix=f"add {train}", keys=(key, train))


def _aligned(v: Values) -> Iterable[Problem]:
    """Labels and rewards go with the data prefix at the same place in the list."""
    for side in SIDES:
        for split in SPLITS:
            data = _paths(v, side, split)
            for role in ("_label", "_reward"):
                other, key, base = _paths(v, side, split, role), f"{side}{split}{role}_data_paths", f"{side}{split}_data_paths"
                if other and data is None:
                    yield Problem(f"{key} is set, but {base} is not", fix=f"add {base}, one prefix per entry of {key}", keys=(key, base))
                elif other and data and len(other) != len(data):
                    yield _counts(key, len(other), base, len(data))


def _pairs(v: Values) -> Iterable[Problem]:
    for split in SPLITS:
        pos, neg = f"pos_{split}_data_paths", f"neg_{split}_data_paths"
        if v[pos] and v[neg] and len(v[pos]) != len(v[neg]):
            yield _counts(pos, len(v[pos]), neg, len(v[neg]))
        elif bool(v[pos]) != bool(v[neg]):
            there, missing = (pos, neg) if v[pos] else (neg, pos)
            yield Problem(f"{there} is set, but {missing} is not", fix=f"add {missing}: pairs need both halves", keys=(there, missing))


def _labels_everywhere(v: Values) -> Iterable[Problem]:
    """What a batch holds follows from the training data, so the other splits must hold the same."""
    for side in SIDES:
        for split in ("valid", "test"):
            for role in ("_label", "_reward"):
                key, train = f"{side}{split}{role}_data_paths", f"{side}train{role}_data_paths"
                if key in v and v[train] and _paths(v, side, split) and not v[key] and v["eval_iters"] > 0:
                    yield Problem(
                        f"{train} is set, but {side}{split}_data_paths has no {key}",
                        fix=f"add {key}, or leave {side}{split}_data_paths out",
                        keys=(key, train),
                    )


def _weights(v: Values) -> Iterable[Problem]:
    for split in SPLITS:
        key = f"{split}_data_weights"
        weights = v[key]
        if weights is None:
            continue
        base = f"{split}_data_paths" if v[f"{split}_data_paths"] else f"pos_{split}_data_paths"
        paths = v[base]
        if not paths:
            yield Problem(f"{key} is set, but {split}_data_paths is not", fix=f"add {split}_data_paths, or remove {key}", keys=(key,))
        elif len(weights) != len(paths):
            yield _counts(key, len(weights), base, len(paths))
        elif min(weights) < 0 or sum(weights) <= 0:
            yield Problem(f"{key} is {shown(weights)}", allowed="numbers >= 0, not all 0", fix="give each prefix its share", keys=(key,))


def _counts(key: str, count: int, base: str, expected: int) -> Problem:
    return Problem(
        f"{key} has {count} entries, {base} has {expected}",
        allowed=f"{expected} entries",
        fix="give one entry per prefix",
        keys=(key, base),
    )


def _split(v: Values) -> Iterable[Problem]:
    if parse_split(v["split"]) is None:
        yield Problem(
            f"split is {shown(v['split'])}",
            allowed='up to three numbers >= 0, such as "969, 30, 1"',
            fix="correct the numbers",
            keys=("split",),
        )


def _epochs(v: Values) -> Iterable[Problem]:
    reasons = []
    if v["pack_impl"] != "packed":
        reasons.append(("pack_impl", f"pack_impl is {v['pack_impl']}, not packed"))
    if v["dataset_impl"] != "gpt2":
        reasons.append(("dataset_impl", f"dataset_impl is {v['dataset_impl']}, not gpt2"))
    if any(weight != 1 for weight in v["train_data_weights"] or ()):
        reasons.append(("train_data_weights", "train_data_weights are not all 1"))
    if v["weight_by_num_documents"]:
        reasons.append(("weight_by_num_documents", "weight_by_num_documents is on"))
    for key, reason in reasons:
        yield Problem(f"train_epochs counts passes over all data, but {reason}", fix="use train_iters", keys=("train_epochs", key))


def _objective(v: Values) -> Iterable[Problem]:
    """Which kind of data each objective learns from."""
    wanted = {"normal": "gpt2", "dpo": "pairwise", "rm": "pairwise", "kto": "gpt2", "reinforce": "online"}[v["train_impl"]]
    if v["dataset_impl"] != wanted:
        yield Problem(
            f"train_impl {v['train_impl']} learns from {wanted} data, dataset_impl is {v['dataset_impl']}",
            allowed=f"dataset_impl {wanted}",
            fix=f"set dataset_impl: {wanted}",
            keys=("dataset_impl", "train_impl"),
        )
    if v["dataset_impl"] == "pairwise" and v["pack_impl"] == "packed":
        yield Problem(
            "pairs cannot be packed",
            allowed="unpacked or pack_until_overflow",
            fix="set pack_impl: unpacked",
            keys=("pack_impl", "dataset_impl"),
        )
    if v["dataset_impl"] == "pairwise" and not v["pos_train_data_paths"] and v["train_iters"] != 0:
        fix = "add pos_train_data_paths and neg_train_data_paths"
        yield Problem("dataset_impl pairwise has no pairs to train on", fix=fix, keys=("dataset_impl", "pos_train_data_paths"))
    if wanted != "pairwise" and v["dataset_impl"] != "pairwise" and v["pos_train_data_paths"]:
        yield Problem(
            f"pos_train_data_paths are pairs, dataset_impl is {v['dataset_impl']}",
            fix="set dataset_impl: pairwise and pack_impl: unpacked",
            keys=("pos_train_data_paths", "dataset_impl"),
        )
    if v["train_reward_data_paths"] and v["pack_impl"] != "unpacked":
        yield Problem(
            f"rewards belong to whole documents, pack_impl is {v['pack_impl']}", allowed="unpacked", fix="set pack_impl: unpacked",
            keys=("pack_impl", "train_reward_data_paths"),
        )  # fmt: skip


def _kto(v: Values) -> Iterable[Problem]:
    if v["train_impl"] != "kto":
        return
    if not v["train_reward_data_paths"]:
        yield Problem("train_impl kto needs rewards", fix="add train_reward_data_paths", keys=("train_reward_data_paths", "train_impl"))
    if v["train_micro_batch_size_per_gpu"] < 2:
        yield Problem(
            "train_impl kto compares the samples of a micro batch, which has 1", allowed="a whole number >= 2",
            fix="raise train_micro_batch_size_per_gpu", keys=("train_micro_batch_size_per_gpu", "train_impl"),
        )  # fmt: skip


def _unlearning(v: Values) -> Iterable[Problem]:
    if v["ga_dataset"] is None:
        return
    if v["ga_mode"] == "interval":
        for key in ("ga_interval", "ga_iters"):
            if v[key] is None:
                yield Problem(f"ga_mode interval needs {key}", allowed="a whole number >= 1", fix=f"add {key}", keys=(key,))


def _difference(v: Values) -> Iterable[Problem]:
    for key in ("ga_dataset", "gd_retain_dataset"):
        if v["gd_mode"] and v[key] is None:
            yield Problem(f"gd_mode needs {key}", fix=f"add {key}, or remove gd_mode", keys=(key, "gd_mode"))


def _servers(v: Values) -> Iterable[Problem]:
    hosts, ports = v["online_dataserver_ips"], v["online_dataserver_ports"]
    if isinstance(hosts, list) != isinstance(ports, list) or (isinstance(hosts, list) and len(hosts) != len(ports)):
        yield Problem(
            f"online_dataserver_ips is {shown(hosts)}, online_dataserver_ports {shown(ports)}",
            fix="give both as single values, or one port per host",
            keys=("online_dataserver_ips", "online_dataserver_ports"),
        )


DATA_RULES: Final[tuple[Rule, ...]] = (
    Rule("one-source", (), _one_source),
    Rule("empty-lists", (), _empty),
    Rule("train-first", (), _train_first),
    Rule("aligned-roles", (), _aligned),
    Rule("pairs", (), _pairs),
    Rule("labels-everywhere", (), _labels_everywhere),
    Rule("weights", (), _weights),
    Rule("split", ("split",), _split),
    Rule("epochs", ("train_epochs",), _epochs),
    Rule("objective-and-data", ("train_impl", "dataset_impl", "pack_impl"), _objective),
    Rule("kto", ("train_impl", "train_micro_batch_size_per_gpu"), _kto),
    Rule("unlearning", ("ga_mode",), _unlearning),
    Rule("gradient-difference", ("gd_mode",), _difference),
    Rule("servers", ("online_dataserver_ips", "online_dataserver_ports"), _servers),
    simple(
        "splitting-what",
        ("weight_by_num_documents",),
        lambda v: v["weight_by_num_documents"] and not v["train_data_paths"],
        "weight_by_num_documents weighs the prefixes of train_data_paths, which is not set",
        "add train_data_paths, or remove weight_by_num_documents",
        ("weight_by_num_documents", "train_data_paths"),
    ),
)
