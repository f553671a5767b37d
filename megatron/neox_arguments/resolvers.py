# SPDX-License-Identifier: Apache-2.0
"""Derivations on a state, one function per group of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from .nested import OPTIMIZER_PARAMS
from .placement import HostError, Hosts, count_ranks
from .problems import closest, plain, shown
from .resolve import (
    TRIPLE,
    ResolutionState,
    Unsolvable,
    batch_triple,
    choose_precision,
    decay_iters,
    expand_attention,
    model_ranks,
    parse_split,
)
from .unfinished import RECOMPUTE_ENTRIES

# Data that is made of separate texts: tokens of one must not depend on another.
ISOLATING: Final = tuple(
    f"{side}{split}{role}_data_paths"
    for split in ("train", "valid", "test")
    for side, role in (("", "_label"), ("", "_reward"), ("pos_", ""), ("neg_", ""))
)


def resolve_world(d: ResolutionState, environ: Mapping[str, str], devices: int) -> None:
    """global_num_gpus, world_size, the pipeline and launcher flags; data-parallel ranks must be whole."""
    ranks, source = d.agree("global_num_gpus", "world_size", d["world_size"]), "world_size"
    if ranks is None:
        try:
            ranks, source = count_ranks(Hosts.of(d.values), environ, devices=devices)
        except HostError as error:
            keys = (key for key in ("hostfile", "include", "exclude", "num_nodes") if key in d.given)
            d.refuse(str(error), "correct the hostfile or the filter, or set global_num_gpus", *keys)
            d.bad.update(("global_num_gpus", *TRIPLE))
            ranks, source = 1, "nothing"
    d.derive("global_num_gpus", ranks, source)
    d.derive("world_size", ranks, "global_num_gpus")
    pipe, tensor, context = d["pipe_parallel_size"], d["model_parallel_size"], d["context_parallel_size"]
    shards = model_ranks(d.values)
    if ranks % shards:
        known = d.sources.get("global_num_gpus")
        d.refuse(
            f"{ranks} ranks{f' ({known})' if known else ''} cannot be shared by pipe_parallel_size {pipe} * model_parallel_size {tensor}"
            f"{f' * context_parallel_size {context}' if context > 1 else ''}: {ranks} / {shards} data-parallel ranks is not whole",
            f"set global_num_gpus to a multiple of {shards}, or change the parallel sizes",
            *("global_num_gpus", "pipe_parallel_size", "model_parallel_size", "context_parallel_size")[: 4 if context > 1 else 3],
        )
    d.derive("is_pipe_parallel", d.agree("is_pipe_parallel", "pipe_parallel_size", None) or pipe >= 1, "pipe_parallel_size")
    if d["deepspeed_slurm"] or d["deepspeed_mpi"]:
        d.derive("force_multi", True, "deepspeed_slurm, deepspeed_mpi")


def resolve_batch(d: ResolutionState) -> None:
    """The batch triangle; batch_size is another name of the micro batch."""
    micro = d.agree("batch_size", TRIPLE[1], d[TRIPLE[1]])
    ranks = max(1, d["global_num_gpus"] // model_ranks(d.values))
    try:
        solved = batch_triple(d[TRIPLE[0]], micro, d[TRIPLE[2]], ranks)
    except Unsolvable as error:
        if d.bad.isdisjoint(("global_num_gpus", "pipe_parallel_size", "model_parallel_size", "context_parallel_size")):
            d.note(replace(error.problem, keys=TRIPLE))
        return
    source = ", ".join(key for key in (*TRIPLE, "batch_size") if key in d.given) + f" and {ranks} data-parallel ranks"
    for key, value in zip(TRIPLE, solved, strict=True):
        d.derive(key, value, source)
    d.derive("batch_size", solved[1], TRIPLE[1])


def resolve_precision(d: ResolutionState) -> None:
    """precision and the two blocks; the four single loss-scale keys are entries of the fp16 block."""
    fp16, bf16 = dict(d["fp16"] or {}), dict(d["bf16"] or {})
    if str(fp16.get("type", "fp16")).lower() == "bfloat16":
        d.refuse("fp16.type is bfloat16", "write bf16: {enabled: true} instead of the fp16 block", "fp16", "fp16.type")
    try:
        precision = choose_precision(d["precision"], fp16, bf16)
    except Unsolvable as error:
        d.note(replace(error.problem, keys=("precision", "fp16.enabled", "bf16.enabled")))
        return
    blocks = [key for key in ("fp16", "bf16") if key in d.given]
    d.derive("precision", precision, ", ".join(blocks) if blocks else "default")
    if precision == "fp16":
        _loss_scale(d, fp16)
        d.derive("fp16", {**fp16, "enabled": True}, "precision")
    elif precision == "bfloat16":
        d.derive("bf16", {**bf16, "enabled": True}, "precision")
    d.derive("dynamic_loss_scale", not d["loss_scale"], "loss_scale")


def _loss_scale(d: ResolutionState, fp16: dict[str, Any]) -> None:
    """Bring the single keys and the entries of the fp16 block to the same values."""
    for key, entry in (("loss_scale",) * 2, ("hysteresis",) * 2, ("loss_scale_window",) * 2, ("min_scale", "min_loss_scale")):
        value = d.agree(key, f"fp16.{entry}", fp16.get(entry))
        value = d[key] if value is None else value
        if value is not None:
            fp16[entry] = value
            d.derive(key, value, f"fp16.{entry}")


def resolve_zero(d: ResolutionState) -> None:
    """The ZeRO block and its derived copies."""
    block, source = dict(d["zero_optimization"] or {}), "zero_optimization"
    if d["zero_optimization"] is None:
        sizes = {"allgather_bucket_size": 500000000, "reduce_bucket_size": 500000000}
        flags = {"allgather_partitions": True, "reduce_scatter": True, "overlap_comm": False, "contiguous_gradients": False}
        block = {"stage": 0, **flags, **sizes}
        block |= {entry: d[f"zero_{entry}"] for entry in block if f"zero_{entry}" in d.given}
        source = "default"
    for entry in ("stage", "reduce_scatter", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size"):
        key = f"zero_{entry}"
        value = d.agree(key, f"zero_optimization.{entry}", block.get(entry))
        if value is None:
            continue
        block[entry] = value
        if value != "auto":
            d.derive(key, value, f"zero_optimization.{entry}")
    if "stage" not in block:
        stages = "0, 1, 2 or 3"
        d.refuse("zero_optimization lacks `stage`", f"add stage: {stages}", "zero_optimization.stage", allowed=stages)
        block["stage"] = 0
    d.derive("zero_optimization", block, source)


def resolve_optimizer(d: ResolutionState) -> None:
    """The optimizer block, its type, learning rate and weight decay; the scheduler of onebitadam."""
    block, source = dict(d["optimizer"] or {}), "default" if d["optimizer"] is None else "optimizer"
    params = dict(block.get("params") or {})
    if d["optimizer"] is None:
        block["type"] = d["optimizer_type"] if "optimizer_type" in d.given else "Adam"
        params = {} if block["type"].lower() in ("sm3", "madgrad_wd", "sgd", "lion", "muon") else {"betas": [0.9, 0.999], "eps": 1.0e-8}
    name = str(block.get("type", "")).lower()
    if "type" in block and name not in OPTIMIZER_PARAMS:
        near = closest(name, OPTIMIZER_PARAMS)
        fix, allowed = f"write {near}" if near else "use an optimizer that exists", "one of " + ", ".join(OPTIMIZER_PARAMS)
        d.refuse(f"optimizer.type is {shown(block['type'])}", fix, "optimizer.type", allowed=allowed, closest=near)
        name = "adam"
    d.derive("optimizer_type", d.agree("optimizer_type", "optimizer.type", name or None) or "adam", "optimizer.type")
    lr = d.agree("lr", "optimizer.params.lr", params.get("lr"))
    params["lr"] = 0.001 if lr is None else float(lr)
    d.derive("lr", params["lr"], "default" if lr is None else "optimizer.params.lr")
    # One place for the decay: the optimizer's constructor would otherwise receive it twice.
    decay = d.agree("weight_decay", "optimizer.params.weight_decay", params.pop("weight_decay", None))
    if decay is not None:
        d.derive("weight_decay", float(decay), "optimizer.params.weight_decay")
    d.derive("optimizer", {**block, "params": params}, source)


def resolve_clipping(d: ResolutionState) -> None:
    """gradient_clipping and clip_grad are one number."""
    value = d.agree("clip_grad", "gradient_clipping", d["gradient_clipping"] if "gradient_clipping" in d.given else None)
    value = d["gradient_clipping"] if value is None else value
    d.derive("gradient_clipping", value, "clip_grad")
    d.derive("clip_grad", value, "gradient_clipping")


def resolve_schedule(d: ResolutionState) -> None:
    """lr_decay_iters, and the DeepSpeed scheduler that onebitadam needs."""
    last, fraction, steps = d["lr_decay_iters"], d["lr_decay_fraction"], d["train_iters"]
    if last is not None and fraction is not None and steps is not None and last != (wanted := decay_iters(None, fraction, steps)):
        what = f"lr_decay_iters is {last}, but lr_decay_fraction {plain(fraction)} of train_iters is {wanted}"
        d.refuse(what, "set one of the two", "lr_decay_iters", "lr_decay_fraction")
    source = "train_iters" if fraction is None else "train_iters, lr_decay_fraction"
    d.derive("lr_decay_iters", decay_iters(last, fraction, steps), source)
    if d["optimizer_type"] == "onebitadam" and d["scheduler"] is None and steps is not None:
        params = {"warmup_min_lr": 0, "warmup_max_lr": d["lr"]}
        params |= {"warmup_num_steps": int(steps * d["warmup"]), "total_num_steps": d["lr_decay_iters"]}
        d.derive("scheduler", {"type": "WarmupDecayLR", "params": params}, "optimizer.type")


def resolve_model(d: ResolutionState) -> None:
    """Lengths, key/value heads, layer types, and whether documents see each other."""
    longest, length = d["max_position_embeddings"], d["seq_length"]
    if longest is None and length is not None and "max_position_embeddings" not in d.bad:
        d.derive("max_position_embeddings", length, "seq_length")
    if length is None and longest is not None and "seq_length" not in d.bad:
        d.derive("seq_length", longest, "max_position_embeddings")
    if d["num_kv_heads"] is None and d["num_attention_heads"] is not None:
        d.derive("num_kv_heads", d["num_attention_heads"], "num_attention_heads")
    if d["num_layers"] is not None:
        try:
            d.derive("attention_config", expand_attention(d["attention_config"], d["num_layers"]), "attention_config, num_layers")
        except Unsolvable as error:
            d.note(replace(error.problem, keys=("attention_config", "num_layers")))
    if d["attention_over_documents"] is None:
        reason = next((key for key in ISOLATING if d[key]), None)
        reason = "train_impl" if d["train_impl"] != "normal" else reason
        reason = "dataset_impl" if d["dataset_impl"] == "pairwise" else reason
        d.derive("attention_over_documents", "isolated" if reason else "joined", reason or "default")


def resolve_data(d: ResolutionState) -> None:
    """The reader, and which of training, validation and test there is data for."""
    if d["data_impl"] == "infer":
        d.derive("data_impl", "mmap", "the only format there is")
    shares = parse_split(d["split"]) or (1.0, 1.0, 1.0)
    steps = {"train": bool(d["train_iters"] or d["train_epochs"]), "valid": d["eval_iters"] > 0, "test": d["eval_iters"] > 0}
    for (split, enough), share in zip(steps.items(), shares, strict=True):
        there = bool(d[f"{split}_data_paths"] or d[f"pos_{split}_data_paths"]) or (d["data_path"] is not None and share > 0)
        there = there or (d["dataset_impl"] == "online" and split == "train")
        if d[f"do_{split}"] is None:
            d.derive(f"do_{split}", there and enough, "data and iterations")


def resolve_recompute(d: ResolutionState) -> None:
    """The two entries of DeepSpeed's activation checkpointing block that do something replace the single keys."""
    block = d["activation_checkpointing"]
    if block is not None:
        for key, entry in RECOMPUTE_ENTRIES.items():
            d.derive(key, bool(block.get(entry, False)), "activation_checkpointing")


def resolve_text(d: ResolutionState) -> None:
    """Where prompts come from."""
    if d["text_gen_type"] is None:
        d.derive("text_gen_type", "input-file" if d["sample_input_file"] else "unconditional", "sample_input_file")


RESOLVERS: Final[tuple[Callable[[ResolutionState], None], ...]] = (
    resolve_batch,
    resolve_precision,
    resolve_zero,
    resolve_optimizer,
    resolve_clipping,
    resolve_schedule,
    resolve_model,
    resolve_data,
    resolve_recompute,
    resolve_text,
)
