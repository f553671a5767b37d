# SPDX-License-Identifier: Apache-2.0
"""Rules about data paths, mixtures and objectives, as far as they can be told without opening a file."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Final

from ..problems import Problem, shown
from ..resolve import parse_split
from .rule import Rule, Values, simple

SPLITS: Final = ("train", "valid", "test")
SIDES: Final = ("", "pos_", "neg_")
# What stands before "_data_paths" in the names of the keys: "train", ..., "neg_test".
PLACES: Final = tuple(f"{side}{split}" for side in SIDES for split in SPLITS)
ROLES: Final = ("_label", "_reward")


def _one_source(v: Values) -> Iterable[Problem]:
    for key in (f"{place}_data_paths" for place in PLACES):
        if v["data_path"] is not None and v[key]:
            fix = f"keep data_path with split, or {key} and its like"
            yield Problem(f"data_path and {key} are two ways to name the data", fix=fix, keys=(key, "data_path"))


def _empty(v: Values) -> Iterable[Problem]:
    for key in (f"{place}{role}_data_paths" for place in PLACES for role in ("", *ROLES)):
        if v.get(key) == []:
            yield Problem(f"{key} is an empty list", fix="name at least one prefix, or leave the key out", keys=(key,))


def _train_first(v: Values) -> Iterable[Problem]:
    for side, split in product(("", "pos_"), ("valid", "test")):
        key, train = f"{side}{split}_data_paths", f"{side}train_data_paths"
        if v[key] and not v[train] and v["train_iters"] != 0 and v["dataset_impl"] != "online":
            yield Problem(f"{key} is set, but {train} is not", fix=f"add {train}", keys=(key, train))


def _aligned(v: Values) -> Iterable[Problem]:
    """Labels and rewards go with the data prefix at the same place in the list."""
    for place in PLACES:
        for role in ROLES:
            key, base = f"{place}{role}_data_paths", f"{place}_data_paths"
            if v.get(key) and v[base] is None:
                yield Problem(f"{key} is set, but {base} is not", fix=f"add {base}, one prefix per entry of {key}", keys=(key, base))
            elif v.get(key) and v[base]:
                yield from _same_count(v, key, base)


def _same_count(v: Values, key: str, base: str) -> Iterable[Problem]:
    count, expected = len(v[key]), len(v[base])
    if count != expected:
        what = f"{key} has {count} entries, {base} has {expected}"
        yield Problem(what, allowed=f"{expected} entries", fix="give one entry per prefix", keys=(key, base))


def _pairs(v: Values) -> Iterable[Problem]:
    for split in SPLITS:
        pos, neg = f"pos_{split}_data_paths", f"neg_{split}_data_paths"
        if v[pos] and v[neg]:
            yield from _same_count(v, pos, neg)
        elif v[pos] or v[neg]:
            there, missing = (pos, neg) if v[pos] else (neg, pos)
            yield Problem(f"{there} is set, but {missing} is not", fix=f"add {missing}: pairs need both halves", keys=(there, missing))


def _labels_everywhere(v: Values) -> Iterable[Problem]:
    """What a batch holds follows from the training data, so the other splits must hold the same."""
    for side, split, role in product(SIDES, ("valid", "test"), ROLES):
        key, train, base = f"{side}{split}{role}_data_paths", f"{side}train{role}_data_paths", f"{side}{split}_data_paths"
        if key in v and v[train] and v[base] and not v[key] and v["eval_iters"] > 0:
            what = f"{train} is set, but {base} has no {key}"
            yield Problem(what, fix=f"add {key}, or leave {base} out", keys=(key, train))


def _weights(v: Values) -> Iterable[Problem]:
    for split in SPLITS:
        key, paths = f"{split}_data_weights", f"{split}_data_paths"
        weights = v[key]
        if weights is None:
            continue
        base = paths if v[paths] else f"pos_{paths}"
        if not v[base]:
            yield Problem(f"{key} is set, but {paths} is not", fix=f"add {paths}, or remove {key}", keys=(key,))
        elif len(weights) != len(v[base]):
            yield from _same_count(v, key, base)
        elif min(weights) < 0 or sum(weights) <= 0:
            yield Problem(f"{key} is {shown(weights)}", allowed="numbers >= 0, not all 0", fix="give each prefix its share", keys=(key,))


def _epochs(v: Values) -> Iterable[Problem]:
    reasons = {
        "pack_impl": v["pack_impl"] != "packed" and f"pack_impl is {v['pack_impl']}, not packed",
        "dataset_impl": v["dataset_impl"] != "gpt2" and f"dataset_impl is {v['dataset_impl']}, not gpt2",
        "train_data_weights": any(weight != 1 for weight in v["train_data_weights"] or ()) and "train_data_weights are not all 1",
        "weight_by_num_documents": v["weight_by_num_documents"] and "weight_by_num_documents is on",
    }
    for key, reason in reasons.items():
        if reason:
            yield Problem(f"train_epochs counts passes over all data, but {reason}", fix="use train_iters", keys=("train_epochs", key))


def _objective(v: Values) -> Iterable[Problem]:
    """Which kind of data each objective learns from."""
    wanted = {"normal": "gpt2", "dpo": "pairwise", "rm": "pairwise", "kto": "gpt2", "reinforce": "online"}[v["train_impl"]]
    pairwise = v["dataset_impl"] == "pairwise"
    if v["dataset_impl"] != wanted:
        yield Problem(
            f"train_impl {v['train_impl']} learns from {wanted} data, dataset_impl is {v['dataset_impl']}",
            allowed=f"dataset_impl {wanted}",
            fix=f"set dataset_impl: {wanted}",
            keys=("dataset_impl", "train_impl"),
        )
    if pairwise and v["pack_impl"] == "packed":
        allowed, keys = "unpacked or pack_until_overflow", ("pack_impl", "dataset_impl")
        yield Problem("pairs cannot be packed", allowed=allowed, fix="set pack_impl: unpacked", keys=keys)
    if pairwise and not v["pos_train_data_paths"] and v["train_iters"] != 0:
        fix = "add pos_train_data_paths and neg_train_data_paths"
        yield Problem("dataset_impl pairwise has no pairs to train on", fix=fix, keys=("dataset_impl", "pos_train_data_paths"))
    if wanted != "pairwise" and not pairwise and v["pos_train_data_paths"]:
        yield Problem(
            f"pos_train_data_paths are pairs, dataset_impl is {v['dataset_impl']}",
            fix="set dataset_impl: pairwise and pack_impl: unpacked",
            keys=("pos_train_data_paths", "dataset_impl"),
        )
    if v["train_reward_data_paths"] and v["pack_impl"] != "unpacked":
        what, keys = f"rewards belong to whole documents, pack_impl is {v['pack_impl']}", ("pack_impl", "train_reward_data_paths")
        yield Problem(what, allowed="unpacked", fix="set pack_impl: unpacked", keys=keys)


def _ascent_bursts(v: Values) -> Iterable[Problem]:
    for key in ("ga_interval", "ga_iters"):
        if v["ga_mode"] == "interval" and v[key] is None:
            yield Problem(f"ga_mode interval needs {key}", allowed="a whole number >= 1", fix=f"add {key}", keys=(key,))


def _difference(v: Values) -> Iterable[Problem]:
    for key in ("ga_dataset", "gd_retain_dataset"):
        if v["gd_mode"] and v[key] is None:
            yield Problem(f"gd_mode needs {key}", fix=f"add {key}, or remove gd_mode", keys=(key, "gd_mode"))


def _uneven_servers(v: Values) -> bool:
    hosts, ports = v["online_dataserver_ips"], v["online_dataserver_ports"]
    return isinstance(hosts, list) != isinstance(ports, list) or (isinstance(hosts, list) and len(hosts) != len(ports))


# fmt: off
DATA_RULES: Final[tuple[Rule, ...]] = (
    Rule("", _one_source),
    Rule("", _empty),
    Rule("", _train_first),
    Rule("", _aligned),
    Rule("", _pairs),
    Rule("", _labels_everywhere),
    Rule("", _weights),
    simple("split", lambda v: parse_split(v["split"]) is None, lambda v: f"split is {shown(v['split'])}", "correct the numbers",
           allowed='up to three numbers >= 0, such as "969, 30, 1"'),
    Rule("train_epochs", _epochs),
    Rule("train_impl dataset_impl pack_impl", _objective),
    simple("train_impl train_micro_batch_size_per_gpu", lambda v: v["train_impl"] == "kto" and not v["train_reward_data_paths"],
           "train_impl kto needs rewards", "add train_reward_data_paths", "train_reward_data_paths train_impl"),
    simple("train_impl train_micro_batch_size_per_gpu", lambda v: v["train_impl"] == "kto" and v["train_micro_batch_size_per_gpu"] < 2,
           "train_impl kto compares the samples of a micro batch, which has 1", "raise train_micro_batch_size_per_gpu",
           "train_micro_batch_size_per_gpu train_impl", allowed="a whole number >= 2"),
    Rule("ga_mode ga_dataset", _ascent_bursts),
    Rule("gd_mode", _difference),
    simple("online_dataserver_ips online_dataserver_ports", _uneven_servers,
           lambda v: f"online_dataserver_ips is {shown(v['online_dataserver_ips'])},"
                     f" online_dataserver_ports {shown(v['online_dataserver_ports'])}",
           "give both as single values, or one port per host"),
    simple("weight_by_num_documents", lambda v: v["weight_by_num_documents"] and not v["train_data_paths"],
           "weight_by_num_documents weighs the prefixes of train_data_paths, which is not set",
           "add train_data_paths, or remove weight_by_num_documents", "weight_by_num_documents train_data_paths"),
)
