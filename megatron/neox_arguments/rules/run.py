# SPDX-License-Identifier: Apache-2.0
"""Rules about a run: length, optimisation, ZeRO, checkpoints, launch, profiling."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from ..problems import Problem, plain, shown
from .rule import Rule, Values, simple


def _stage(v: Values) -> int:
    stage = (v["zero_optimization"] or {}).get("stage")
    return stage if isinstance(stage, int) else 0


def _autotuned(v: Values) -> bool:
    return bool(v["autotuning"] and v["autotuning"].get("enabled"))


def _stage_range(v: Values) -> Iterable[Problem]:
    stage = v["zero_optimization"].get("stage")
    if not _autotuned(v) and (isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3):
        yield Problem(
            f"zero_optimization.stage is {shown(stage)}", allowed="0, 1, 2 or 3", fix="choose a stage", keys=("zero_optimization.stage",)
        )


def _offload(v: Values) -> Iterable[Problem]:
    block: dict[str, Any] = v["zero_optimization"]
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        part = block.get(name)
        if isinstance(part, dict) and part.get("device", "none") != "none" and _stage(v) < least:
            yield Problem(
                f"zero_optimization.{name} needs ZeRO stage {least}{' or more' if least < 3 else ''}, stage is {_stage(v)}",
                fix=f"set stage: {least}, or remove {name}",
                keys=(f"zero_optimization.{name}", "zero_optimization.stage"),
            )


def _superoffload(v: Values) -> Iterable[Problem]:
    part = v["zero_optimization"].get("offload_optimizer")
    if not isinstance(part, dict) or not part.get("super_offload"):
        return
    key = "zero_optimization.offload_optimizer.super_offload"
    if _stage(v) != 3 or part.get("device") != "cpu":
        yield Problem(
            f"{key} works with ZeRO stage 3 and offload_optimizer.device cpu, not with stage {_stage(v)} and {part.get('device')}",
            fix="set stage: 3 and device: cpu, or remove super_offload",
            keys=(key, "zero_optimization.stage"),
        )
    if v["optimizer_type"] not in ("adam", "adamw", "cpu_adam"):
        yield Problem(
            f"{key} has an Adam of its own on the host, so optimizer {v['optimizer_type']} would not be used",
            fix="set optimizer.type: adam, or remove super_offload",
            keys=(key, "optimizer.type"),
        )


def _iterations(v: Values) -> Iterable[Problem]:
    if v["train_iters"] is None and v["train_epochs"] is None:
        yield Problem(
            "the length of training is not set", fix="add train_iters: N (or train_epochs: N)", keys=("train_iters", "train_epochs")
        )
    if v["train_iters"] is not None and v["train_epochs"] is not None:
        yield Problem(
            f"train_iters {v['train_iters']} and train_epochs {v['train_epochs']} both set the length of training",
            fix="keep one of the two",
            keys=("train_iters", "train_epochs"),
        )


def _checkpoint_factor(v: Values) -> Iterable[Problem]:
    factor = v["checkpoint_factor"]
    if v["save"] is not None and factor is None and not v["extra_save_iters"]:
        yield Problem(
            f"save is {shown(v['save'])}, but nothing says when to save", fix="add checkpoint_factor or extra_save_iters",
            keys=("save", "checkpoint_factor"),
        )  # fmt: skip
    if factor is None:
        return
    if v["checkpoint_scale"] == "linear" and (factor < 1 or factor != int(factor)):
        yield Problem(
            f"checkpoint_factor is {plain(factor)} with checkpoint_scale linear", allowed="a whole number >= 1",
            fix="give the number of steps between two checkpoints", keys=("checkpoint_factor",),
        )  # fmt: skip
    if v["checkpoint_scale"] == "log" and factor <= 1:
        yield Problem(
            f"checkpoint_factor is {plain(factor)} with checkpoint_scale log", allowed="a number > 1",
            fix="give the ratio of the steps of two checkpoints, such as 2", keys=("checkpoint_factor", "checkpoint_scale"),
        )  # fmt: skip


def _rollback(v: Values) -> Iterable[Problem]:
    for key in ("nonfinite_policy", "loss_spike_policy"):
        if v[key] != "rollback":
            continue
        if v["save"] is None:
            yield Problem(f"{key} rollback goes back to a checkpoint of the run, but save is not set", fix="set save", keys=(key, "save"))
        if v["no_save_optim"]:
            yield Problem(
                f"{key} rollback needs the optimizer's state, which no_save_optim leaves out", fix="remove no_save_optim",
                keys=(key, "no_save_optim"),
            )  # fmt: skip
        if v["train_epochs"] is not None:
            yield Problem(
                f"{key} rollback makes up for the samples left out, for which train_epochs leaves none", fix="use train_iters",
                keys=(key, "train_epochs"),
            )  # fmt: skip


def _spikes(v: Values) -> Iterable[Problem]:
    if v["loss_spike_factor"] is None and v["loss_spike_policy"] != "warn":
        yield Problem(
            f"loss_spike_policy {v['loss_spike_policy']} does nothing: loss_spike_factor is not set", allowed="a number > 1",
            fix="add loss_spike_factor: 4, for instance, or remove loss_spike_policy", keys=("loss_spike_policy", "loss_spike_factor"),
        )  # fmt: skip


def _extra_saves(v: Values) -> Iterable[Problem]:
    if any(step < 0 for step in v["extra_save_iters"]):
        yield Problem(
            f"extra_save_iters is {shown(v['extra_save_iters'])}", allowed="whole numbers >= 0", fix="remove negative steps",
            keys=("extra_save_iters",),
        )  # fmt: skip


def _extra_args(v: Values) -> Iterable[Problem]:
    for name, value in v["deepspeed_extra_args"].items():
        if name in v and v[name] is not None and v[name] != value:
            yield Problem(
                f"deepspeed_extra_args.{name} is {shown(value)}, but {name} is {shown(v[name])}",
                fix=f"set {name} only, outside of deepspeed_extra_args",
                keys=(f"deepspeed_extra_args.{name}", name),
            )

    for name in ("activation_checkpointing", "pipeline.activation_checkpoint_interval"):
        block, _, entry = name.partition(".")
        value = v["deepspeed_extra_args"].get(block)
        if value and (not entry or (isinstance(value, dict) and value.get(entry))):
            yield Problem(
                f"deepspeed_extra_args.{name} does nothing: recomputation is not DeepSpeed's here",
                fix="set checkpoint_activations and the keys beside it at the top level",
                keys=(f"deepspeed_extra_args.{name}",),
            )


def _selective(v: Values) -> bool:
    return bool(v["checkpoint_activations"]) and v["checkpoint_granularity"] == "selective"


def _selective_inputs(v: Values) -> Iterable[Problem]:
    keys = tuple(key for key in ("checkpoint_in_cpu", "partition_activations") if v[key])
    if keys and _selective(v):
        yield Problem(
            f"{', '.join(keys)} would move only the input of each span, which is little of what checkpoint_granularity: selective keeps",
            fix=f"set checkpoint_granularity: full, or remove {', '.join(keys)}",
            keys=(*keys, "checkpoint_granularity"),
        )


RUN_RULES: Final[tuple[Rule, ...]] = (
    Rule("length", (), _iterations),
    Rule("zero-stage", ("zero_optimization",), _stage_range),
    Rule("zero-offload", ("zero_optimization",), _offload),
    Rule("zero-superoffload", ("zero_optimization",), _superoffload),
    Rule("when-to-save", (), _checkpoint_factor),
    Rule("rollback", ("nonfinite_policy", "loss_spike_policy"), _rollback),
    Rule("spikes", ("loss_spike_policy",), _spikes),
    Rule("extra-saves", ("extra_save_iters",), _extra_saves),
    simple(
        "keep-every",
        ("keep_every",),
        lambda v: v["keep_last_n_checkpoints"] is None,
        "keep_every {keep_every} says what is not deleted, and nothing is: keep_last_n_checkpoints is not set",
        fix="set keep_last_n_checkpoints, or remove keep_every",
        about=("keep_every", "keep_last_n_checkpoints"),
    ),
    Rule("extra-args", ("deepspeed_extra_args",), _extra_args),
    Rule("selective-and-inputs", ("checkpoint_granularity",), _selective_inputs),
    simple(
        "selective-and-compile",
        ("checkpoint_granularity",),
        lambda v: _selective(v) and v["torch_compile"],
        "checkpoint_granularity selective chooses among single operations, which torch_compile fuses",
        "set checkpoint_granularity: full, or torch_compile: false",
        ("checkpoint_granularity", "torch_compile"),
    ),
    simple(
        "selective-and-zero",
        ("checkpoint_granularity",),
        lambda v: _selective(v) and _stage(v) >= 3,
        "checkpoint_granularity selective makes wrong gradients with ZeRO stage 3, which gathers weights around whole modules",
        "set checkpoint_granularity: full, or ZeRO stage 0, 1 or 2",
        ("checkpoint_granularity", "zero_optimization.stage"),
    ),
    simple(
        "min-lr",
        ("min_lr", "lr"),
        lambda v: v["min_lr"] > v["lr"],
        lambda v: f"min_lr {plain(v['min_lr'])} is greater than the learning rate {plain(v['lr'])}",
        "lower min_lr, or raise optimizer.params.lr",
        ("min_lr", "lr", "optimizer.params.lr"),
    ),
    simple(
        "decay-within-training",
        ("lr_decay_iters", "warmup"),
        lambda v: v["lr_decay_style"] == "wsd" and v["warmup"] + v["wsd_decay_fraction"] > 1,
        "warmup {warmup} and wsd_decay_fraction {wsd_decay_fraction} together are more than the whole schedule",
        "lower one of the two",
        ("warmup", "wsd_decay_fraction"),
    ),
    simple(
        "one-schedule-on-resume",
        ("override_lr_scheduler", "use_checkpoint_lr_scheduler"),
        lambda v: v["override_lr_scheduler"] and v["use_checkpoint_lr_scheduler"],
        "override_lr_scheduler and use_checkpoint_lr_scheduler exclude each other",
        "keep one of the two",
    ),
    simple(
        "pipeline-and-zero",
        ("pipe_parallel_size",),
        lambda v: v["pipe_parallel_size"] >= 1 and _stage(v) >= 2,
        lambda v: f"the pipeline engine (pipe_parallel_size {v['pipe_parallel_size']}) does not work with ZeRO stage {_stage(v)}",
        "set pipe_parallel_size: 0, or ZeRO stage 0 or 1",
        ("pipe_parallel_size", "zero_optimization.stage"),
    ),
    simple(
        "experts-and-zero",
        ("moe_num_experts",),
        lambda v: v["moe_num_experts"] > 1 and _stage(v) >= 2,
        "mixture-of-experts layers work with ZeRO stage 0 and 1 only",
        "set zero_optimization.stage: 1",
        ("moe_num_experts", "zero_optimization.stage"),
    ),
    simple(
        "replicas-and-zero",
        ("replica_check_interval",),
        lambda v: _stage(v) == 3,
        "replica_check_interval {replica_check_interval} compares what ranks hold alike, and with ZeRO stage 3 each weight is on one only",
        "remove replica_check_interval, or set ZeRO stage 0, 1 or 2",
        ("replica_check_interval", "zero_optimization.stage"),
    ),
    simple(
        "recurrent-and-zero",
        ("attention_config",),
        lambda v: any(name in ("mamba", "rwkv") for name in v["attention_config"]) and _stage(v) > 2,
        "mamba and rwkv layers work with ZeRO stage 0, 1 and 2 only",
        "set zero_optimization.stage: 2",
        ("zero_optimization.stage", "attention_config"),
    ),
    simple(
        "one-mixed-precision",
        ("amp",),
        lambda v: v["amp"].get("enabled") and v["precision"] != "fp32",
        "amp and precision {precision} are two ways to the same end",
        "keep one of the two",
        ("amp", "precision", "fp16", "bf16"),
    ),
    simple(
        "one-host-filter",
        ("include", "exclude"),
        lambda v: True,
        "include and exclude cannot be used together",
        "keep one of the two",
    ),
    simple(
        "deepspeed-on", ("deepspeed",), lambda v: not v["deepspeed"], "deepspeed is false, but there is no other engine", "remove the key"
    ),
    simple(
        "iteration-of-what",
        ("iteration",),
        lambda v: v["load"] is None,
        "iteration {iteration} names a checkpoint to read, but load is not set",
        "set load to the folder that holds global_step{iteration}, or remove iteration",
        ("iteration", "load"),
    ),
    simple(
        "data-change-of-what",
        ("allow_data_change",),
        lambda v: v["allow_data_change"] and v["load"] is None,
        "allow_data_change is about a resumed run, but load is not set",
        "set load, or remove allow_data_change",
        ("allow_data_change", "load"),
    ),
    simple(
        "async-of-what",
        ("checkpoint_async",),
        lambda v: v["checkpoint_async"] and v["save"] is None,
        "checkpoint_async is about saving, but save is not set",
        "set save, or remove checkpoint_async",
        ("checkpoint_async", "save"),
    ),
    simple(
        "export-of-what",
        ("save_hf",),
        lambda v: v["save_hf"] is not False and v["save"] is None,
        "save_hf exports checkpoints, but save is not set",
        "set save, or remove save_hf",
        ("save_hf", "save"),
    ),
    simple(
        "export-interval",
        ("save_hf",),
        lambda v: v["save_hf"] is not False and v["save_hf"] < 1,
        "save_hf is {save_hf}, which is no number of steps",
        "write true, false, or a whole number >= 1",
    ),
    simple(
        "iteration-of-hf",
        ("iteration", "load"),
        lambda v: v["load"].startswith("hf:") and (v["save"] is None or v["finetune"]),
        "iteration {iteration} names a checkpoint, and load names a Hugging Face model",
        "remove iteration, or load the folder that holds global_step{iteration}",
    ),
    simple(
        "hf-what",
        ("load",),
        lambda v: re.fullmatch(r"hf:\s*(@.*)?", v["load"]) is not None,
        "load is {load!r}, which names no model",
        "write hf:<folder of a Hugging Face model>, or hf:<owner>/<name>[@revision]",
    ),
    simple(
        "finetune-what",
        ("finetune",),
        lambda v: v["finetune"] and v["load"] is None,
        "finetune needs a checkpoint to start from, but load is not set",
        "set load, or remove finetune",
        ("finetune", "load"),
    ),
    simple(
        "s3-address",
        ("s3_path",),
        lambda v: not re.match(r"s3://[^/]", v["s3_path"]),
        "s3_path is {s3_path!r}",
        "write s3://bucket/prefix",
    ),
    simple(
        "s3-of-what",
        ("s3_path",),
        lambda v: v["save"] is None,
        "s3_path asks for copies of checkpoints, but save is not set",
        "set save, or remove s3_path",
        ("s3_path", "save"),
    ),
    simple(
        "profile-window",
        ("profile", "profile_step_start", "profile_step_stop"),
        lambda v: v["profile"] and v["profile_step_stop"] <= v["profile_step_start"],
        "profile_step_stop {profile_step_stop} is not after profile_step_start {profile_step_start}",
        "profile at least one step",
        ("profile_step_stop", "profile_step_start"),
    ),
    simple(
        "prompts-from-where",
        ("text_gen_type",),
        lambda v: v["text_gen_type"] == "input-file" and not v["sample_input_file"],
        "text_gen_type is input-file, but sample_input_file is not set",
        "set sample_input_file",
        ("text_gen_type", "sample_input_file"),
    ),
)
