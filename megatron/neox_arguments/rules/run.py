# SPDX-License-Identifier: Apache-2.0
"""Rules about a run: length, optimisation, ZeRO, checkpoints, launch, profiling."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from ..problems import Problem, plain, shown
from .model import RECURRENT, has_layers
from .rule import Rule, Values, lacks, simple, zero_stage


def _no_stage(v: Values) -> bool:
    stage = v["zero_optimization"].get("stage")
    tuned = v["autotuning"] and v["autotuning"].get("enabled")
    return not tuned and (type(stage) is not int or not 0 <= stage <= 3)


def _offload(v: Values) -> Iterable[Problem]:
    block: dict[str, Any] = v["zero_optimization"]
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        part = block.get(name)
        if isinstance(part, dict) and part.get("device", "none") != "none" and zero_stage(v) < least:
            yield Problem(
                f"zero_optimization.{name} needs ZeRO stage {least}{' or more' if least < 3 else ''}, stage is {zero_stage(v)}",
                fix=f"set stage: {least}, or remove {name}",
                keys=(f"zero_optimization.{name}", "zero_optimization.stage"),
            )


def _superoffload(v: Values) -> Iterable[Problem]:
    part = v["zero_optimization"].get("offload_optimizer")
    if not isinstance(part, dict) or not part.get("super_offload"):
        return
    key = "zero_optimization.offload_optimizer.super_offload"
    if zero_stage(v) != 3 or part.get("device") != "cpu":
        yield Problem(
            f"{key} works with ZeRO stage 3 and offload_optimizer.device cpu, not with stage {zero_stage(v)} and {part.get('device')}",
            fix="set stage: 3 and device: cpu, or remove super_offload",
            keys=(key, "zero_optimization.stage"),
        )
    if v["optimizer_type"] not in ("adam", "adamw", "cpu_adam"):
        yield Problem(
            f"{key} has an Adam of its own on the host, so optimizer {v['optimizer_type']} would not be used",
            fix="set optimizer.type: adam, or remove super_offload",
            keys=(key, "optimizer.type"),
        )


def _rollback(v: Values) -> Iterable[Problem]:
    for key in ("nonfinite_policy", "loss_spike_policy"):
        if v[key] != "rollback":
            continue
        if v["save"] is None:
            yield Problem(f"{key} rollback goes back to a checkpoint of the run, but save is not set", fix="set save", keys=(key, "save"))
        if v["no_save_optim"]:
            what = f"{key} rollback needs the optimizer's state, which no_save_optim leaves out"
            yield Problem(what, fix="remove no_save_optim", keys=(key, "no_save_optim"))
        if v["train_epochs"] is not None:
            what = f"{key} rollback makes up for the samples left out, for which train_epochs leaves none"
            yield Problem(what, fix="use train_iters", keys=(key, "train_epochs"))


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


# fmt: off
RUN_RULES: Final[tuple[Rule, ...]] = (
    # Length and schedule
    simple("", lambda v: v["train_iters"] is None and v["train_epochs"] is None, "the length of training is not set",
           "add train_iters: N (or train_epochs: N)", "train_iters train_epochs"),
    simple("train_iters train_epochs", lambda v: True,
           "train_iters {train_iters} and train_epochs {train_epochs} both set the length of training", "keep one of the two"),
    simple("min_lr lr", lambda v: v["min_lr"] > v["lr"],
           lambda v: f"min_lr {plain(v['min_lr'])} is greater than the learning rate {plain(v['lr'])}",
           "lower min_lr, or raise optimizer.params.lr", "min_lr lr optimizer.params.lr"),
    simple("lr_decay_iters warmup", lambda v: v["lr_decay_style"] == "wsd" and v["warmup"] + v["wsd_decay_fraction"] > 1,
           "warmup {warmup} and wsd_decay_fraction {wsd_decay_fraction} together are more than the whole schedule",
           "lower one of the two", "warmup wsd_decay_fraction"),
    simple("override_lr_scheduler use_checkpoint_lr_scheduler",
           lambda v: v["override_lr_scheduler"] and v["use_checkpoint_lr_scheduler"],
           "override_lr_scheduler and use_checkpoint_lr_scheduler exclude each other", "keep one of the two"),
    # ZeRO and precision
    simple("zero_optimization", _no_stage, lambda v: f"zero_optimization.stage is {shown(v['zero_optimization'].get('stage'))}",
           "choose a stage", "zero_optimization.stage", allowed="0, 1, 2 or 3"),
    Rule("zero_optimization", _offload),
    Rule("zero_optimization", _superoffload),
    simple("pipe_parallel_size", lambda v: v["pipe_parallel_size"] >= 1 and zero_stage(v) >= 2,
           "the pipeline engine (pipe_parallel_size {pipe_parallel_size}) does not work with ZeRO stage {zero_optimization[stage]}",
           "set pipe_parallel_size: 0, or ZeRO stage 0 or 1", "pipe_parallel_size zero_optimization.stage"),
    simple("moe_num_experts", lambda v: v["moe_num_experts"] > 1 and zero_stage(v) >= 2,
           "mixture-of-experts layers work with ZeRO stage 0 and 1 only", "set zero_optimization.stage: 1",
           "moe_num_experts zero_optimization.stage"),
    simple("attention_config", lambda v: has_layers(v, *RECURRENT) and zero_stage(v) > 2,
           "mamba and rwkv layers work with ZeRO stage 0, 1 and 2 only", "set zero_optimization.stage: 2",
           "zero_optimization.stage attention_config"),
    simple("replica_check_interval", lambda v: zero_stage(v) == 3,
           "replica_check_interval {replica_check_interval} compares what ranks hold alike, and with ZeRO stage 3 each weight is on one"
           " only",
           "remove replica_check_interval, or set ZeRO stage 0, 1 or 2", "replica_check_interval zero_optimization.stage"),
    simple("amp", lambda v: v["amp"].get("enabled") and v["precision"] != "fp32",
           "amp and precision {precision} are two ways to the same end", "keep one of the two", "amp precision fp16 bf16"),
    Rule("deepspeed_extra_args", _extra_args),
    # Recomputation
    Rule("checkpoint_granularity", _selective_inputs),
    simple("checkpoint_granularity", lambda v: _selective(v) and v["torch_compile"],
           "checkpoint_granularity selective chooses among single operations, which torch_compile fuses",
           "set checkpoint_granularity: full, or torch_compile: false", "checkpoint_granularity torch_compile"),
    simple("checkpoint_granularity", lambda v: _selective(v) and zero_stage(v) >= 3,
           "checkpoint_granularity selective makes wrong gradients with ZeRO stage 3, which gathers weights around whole modules",
           "set checkpoint_granularity: full, or ZeRO stage 0, 1 or 2", "checkpoint_granularity zero_optimization.stage"),
    # Checkpoints
    simple("save", lambda v: v["checkpoint_factor"] is None and not v["extra_save_iters"],
           lambda v: f"save is {shown(v['save'])}, but nothing says when to save", "add checkpoint_factor or extra_save_iters",
           "save checkpoint_factor"),
    simple("checkpoint_factor",
           lambda v: v["checkpoint_scale"] == "linear" and (v["checkpoint_factor"] < 1 or v["checkpoint_factor"] % 1 != 0),
           lambda v: f"checkpoint_factor is {plain(v['checkpoint_factor'])} with checkpoint_scale linear",
           "give the number of steps between two checkpoints", allowed="a whole number >= 1"),
    simple("checkpoint_factor", lambda v: v["checkpoint_scale"] == "log" and v["checkpoint_factor"] <= 1,
           lambda v: f"checkpoint_factor is {plain(v['checkpoint_factor'])} with checkpoint_scale log",
           "give the ratio of the steps of two checkpoints, such as 2", "checkpoint_factor checkpoint_scale", allowed="a number > 1"),
    Rule("nonfinite_policy loss_spike_policy", _rollback),
    simple("loss_spike_policy", lambda v: v["loss_spike_factor"] is None and v["loss_spike_policy"] != "warn",
           "loss_spike_policy {loss_spike_policy} does nothing: loss_spike_factor is not set",
           "add loss_spike_factor: 4, for instance, or remove loss_spike_policy", "loss_spike_policy loss_spike_factor",
           allowed="a number > 1"),
    simple("extra_save_iters", lambda v: min(v["extra_save_iters"], default=0) < 0,
           lambda v: f"extra_save_iters is {shown(v['extra_save_iters'])}", "remove negative steps", allowed="whole numbers >= 0"),
    simple("keep_every", lambda v: v["keep_last_n_checkpoints"] is None,
           "keep_every {keep_every} says what is not deleted, and nothing is: keep_last_n_checkpoints is not set",
           "set keep_last_n_checkpoints, or remove keep_every", "keep_every keep_last_n_checkpoints"),
    lacks("iteration", "load", "iteration {iteration} names a checkpoint to read",
          "set load to the folder that holds global_step{iteration}, or remove iteration"),
    lacks("allow_data_change", "load", "allow_data_change is about a resumed run", "set load, or remove allow_data_change"),
    lacks("checkpoint_async", "save", "checkpoint_async is about saving", "set save, or remove checkpoint_async"),
    lacks("save_hf", "save", "save_hf exports checkpoints", "set save, or remove save_hf"),
    simple("save_hf", lambda v: v["save_hf"] is not False and v["save_hf"] < 1, "save_hf is {save_hf}, which is no number of steps",
           "write true, false, or a whole number >= 1"),
    simple("iteration load", lambda v: v["load"].startswith("hf:") and (v["save"] is None or v["finetune"]),
           "iteration {iteration} names a checkpoint, and load names a Hugging Face model",
           "remove iteration, or load the folder that holds global_step{iteration}"),
    simple("load", lambda v: re.fullmatch(r"hf:\s*(@.*)?", v["load"]) is not None, "load is {load!r}, which names no model",
           "write hf:<folder of a Hugging Face model>, or hf:<owner>/<name>[@revision]"),
    lacks("finetune", "load", "finetune needs a checkpoint to start from", "set load, or remove finetune"),
    simple("s3_path", lambda v: not re.match(r"s3://[^/]", v["s3_path"]), "s3_path is {s3_path!r}", "write s3://bucket/prefix"),
    lacks("s3_path", "save", "s3_path asks for copies of checkpoints", "set save, or remove s3_path"),
    # Launch, profile, text
    simple("include exclude", lambda v: True, "include and exclude cannot be used together", "keep one of the two"),
    simple("deepspeed", lambda v: not v["deepspeed"], "deepspeed is false, but there is no other engine", "remove the key"),
    simple("profile profile_step_start profile_step_stop", lambda v: v["profile"] and v["profile_step_stop"] <= v["profile_step_start"],
           "profile_step_stop {profile_step_stop} is not after profile_step_start {profile_step_start}", "profile at least one step",
           "profile_step_stop profile_step_start"),
    simple("text_gen_type", lambda v: v["text_gen_type"] == "input-file" and not v["sample_input_file"],
           "text_gen_type is input-file, but sample_input_file is not set", "set sample_input_file", "text_gen_type sample_input_file"),
)
