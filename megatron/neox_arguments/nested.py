# SPDX-License-Identifier: Apache-2.0
"""Names and kinds of the entries inside dict-valued keys.

The names are those that DeepSpeed, Hugging Face and the optimizers document. Blocks whose set of names is open
(autotuning, elasticity, deepspeed_extra_args, ...) are not listed and not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from .problems import Problem, closest, shown

# Kinds of entries; a tuple is a choice, a dict a further block.
BOOL, INT, NUM, STR = "true or false", "a whole number", "a number", "a string"
DICT, LIST, BETAS, ANY = "a mapping", "a list", "betas", "any"

Kind = str | tuple[str, ...] | Mapping[str, Any]

_ADAM: Final = {"lr": NUM, "betas": BETAS, "eps": NUM, "weight_decay": NUM, "bias_correction": BOOL, "amsgrad": BOOL}
_TORCH_ADAM: Final = {**_ADAM, "torch_adam": BOOL, "adam_w_mode": BOOL, "fused": BOOL, "foreach": BOOL, "capturable": BOOL}

OPTIMIZER_PARAMS: Final = MappingProxyType[str, Mapping[str, Kind]](
    {
        "adam": {**_TORCH_ADAM, "freeze_step": INT, "momentum": NUM, "cuda_aware": BOOL},
        "adamw": _TORCH_ADAM,
        "cpu_adam": {**_ADAM, "adamw_mode": BOOL, "fp32_optimizer_states": BOOL},
        "cpu_torch_adam": _TORCH_ADAM,
        "onebitadam": {
            **_ADAM, "freeze_step": INT, "cuda_aware": BOOL, "comm_backend_name": STR, "eps_inside_sqrt": BOOL, "max_grad_norm": NUM,
        },
        "sm3": {"lr": NUM, "momentum": NUM, "beta": NUM, "eps": NUM, "weight_decay": NUM},
        "madgrad_wd": {"lr": NUM, "momentum": NUM, "eps": NUM, "weight_decay": NUM},
        "sgd": {"lr": NUM, "momentum": NUM, "dampening": NUM, "weight_decay": NUM, "nesterov": BOOL},
        "lion": {"lr": NUM, "betas": BETAS, "weight_decay": NUM},
        "muon": {
            "lr": NUM, "muon_lr": NUM, "adam_lr": NUM, "momentum": NUM, "nesterov": BOOL, "ns_steps": INT, "ns_method": STR,
            "betas": BETAS, "eps": NUM, "weight_decay": NUM,
        },
    }
)  # fmt: skip

_OFFLOAD: Final = {"device": ("none", "cpu", "nvme"), "nvme_path": STR, "buffer_count": INT, "pin_memory": BOOL}
_MONITOR: Final = {"enabled": BOOL, "output_path": STR, "job_name": STR}

BLOCKS: Final = MappingProxyType[str, Mapping[str, Kind]](
    {
        "zero_optimization": {
            "stage": ANY, "contiguous_gradients": BOOL, "reduce_scatter": BOOL, "reduce_bucket_size": INT,
            "use_multi_rank_bucket_allreduce": BOOL, "allgather_partitions": BOOL, "allgather_bucket_size": INT, "overlap_comm": BOOL,
            "compute_grad_norm": BOOL, "load_from_fp32_weights": BOOL, "elastic_checkpoint": BOOL,
            "offload_param": {**_OFFLOAD, "buffer_size": INT, "max_in_cpu": INT},
            "offload_optimizer": {
                **_OFFLOAD, "pipeline_read": BOOL, "pipeline_write": BOOL, "fast_init": BOOL, "ratio": NUM, "super_offload": BOOL,
                "cpuadam_cores_perc": NUM,
            },
            "zenflow": DICT, "sub_group_size": INT, "cpu_offload": ANY, "cpu_offload_params": ANY, "cpu_offload_param": ANY,
            "cpu_offload_use_pin_memory": ANY,
            "stage3_prefetch_bucket_size": INT, "stage3_param_persistence_threshold": INT, "stage3_model_persistence_threshold": INT,
            "stage3_max_live_parameters": INT, "stage3_max_reuse_distance": INT, "stage3_gather_16bit_weights_on_model_save": BOOL,
            "stage3_gather_fp16_weights_on_model_save": BOOL, "stage3_module_granularity_threshold": INT,
            "stage3_use_all_reduce_for_fetch_params": BOOL, "stage3_allgather_sequential": BOOL, "ignore_unused_parameters": BOOL,
            "legacy_stage1": BOOL, "round_robin_gradients": BOOL, "parameter_alignment": INT, "zero_hpz_partition_size": INT,
            "zero_quantized_weights": BOOL, "zero_quantized_nontrainable_weights": BOOL, "zero_quantized_gradients": BOOL,
            "mics_shard_size": INT, "mics_hierarchical_params_gather": BOOL, "memory_efficient_linear": BOOL,
            "pipeline_loading_checkpoint": BOOL, "override_module_apply": BOOL, "log_trace_cache_warnings": BOOL,
            "enable_sanity_checks": BOOL, "save_muon_momentum_buffer_in_memory": BOOL, "leaf_module": DICT,
        },
        "fp16": {
            "enabled": BOOL, "fp16": BOOL, "type": STR, "auto_cast": BOOL, "loss_scale": NUM, "initial_scale_power": INT,
            "loss_scale_window": NUM, "hysteresis": INT, "consecutive_hysteresis": BOOL, "min_loss_scale": NUM,
            "fp16_master_weights_and_grads": BOOL, "fp16_master_weights_and_gradients": BOOL,
        },
        "bf16": {
            "enabled": BOOL, "bf16": BOOL, "immediate_grad_update": BOOL, "check_grad_overflow": BOOL,
            "bf16_master_weights_and_grads": BOOL, "bf16_optimizer_states": BOOL, "accumulate_grads_in_fp32": BOOL,
        },
        "flops_profiler": {
            "enabled": BOOL, "recompute_fwd_factor": NUM, "profile_step": INT, "module_depth": INT, "top_modules": INT, "detailed": BOOL,
            "output_file": STR,
        },
        "activation_checkpointing": {
            "partition_activations": BOOL, "cpu_checkpointing": BOOL, "contiguous_memory_optimization": BOOL, "number_checkpoints": INT,
            "synchronize_checkpoint_boundary": BOOL, "profile": BOOL,
        },
        "data_types": {"grad_accum_dtype": ("fp32", "fp16", "bf16")},
        "comms_logger": {"enabled": BOOL, "verbose": BOOL, "prof_all": BOOL, "prof_ops": LIST, "debug": BOOL},
        "tensorboard": _MONITOR,
        "csv_monitor": _MONITOR,
        "wandb": {"enabled": BOOL, "group": STR, "team": STR, "project": STR},
        "scheduler": {"type": STR, "params": DICT},
        "curriculum_learning": {
            "enabled": BOOL, "curriculum_type": STR, "min_difficulty": INT, "max_difficulty": INT, "schedule_type": STR,
            "schedule_config": DICT,
        },
        "soft_prompt_tuning": {"enabled": BOOL, "n_tokens": INT, "num_tokens": INT, "init_string": STR, "init_range": NUM},
        "rope_scaling": {
            "rope_type": ("linear", "ntk", "yarn", "llama3", "default"), "type": ("linear", "ntk", "yarn", "llama3", "default"),
            "factor": NUM, "original_max_position_embeddings": INT, "low_freq_factor": NUM, "high_freq_factor": NUM, "beta_fast": NUM,
            "beta_slow": NUM, "attention_factor": NUM,
        },
        "optimizer": {"type": STR, "params": DICT},
    }
)  # fmt: skip

REQUIRED: Final = MappingProxyType(
    {"fp16": ("enabled",), "bf16": ("enabled",), "amp": ("enabled",), "flops_profiler": ("enabled",), "optimizer": ("type",)}
)


def check_block(key: str, block: Mapping[str, Any], *, relaxed: bool = False) -> tuple[dict[str, Any], list[Problem]]:
    """The block with numbers in the kind wanted (5e8 -> 500000000), and what is wrong inside it.

    relaxed: let "auto" stand anywhere, for DeepSpeed's autotuner. Problems have no place yet; their key is the dotted path.
    """
    problems = [
        Problem(f"{key} lacks `{name}`", fix=f"add `{name}` to {key}, or leave {key} out", keys=(key,))
        for name in REQUIRED.get(key, ())
        if name not in block
    ]
    kinds = BLOCKS.get(key)
    if kinds is None:
        return dict(block), problems
    checked = _check(key, block, kinds, problems, relaxed)
    if key == "optimizer" and isinstance(checked.get("params", {}), dict):
        name = str(checked.get("type", "")).lower()
        if name in OPTIMIZER_PARAMS:
            checked["params"] = _check("optimizer.params", checked.get("params", {}), OPTIMIZER_PARAMS[name], problems, relaxed, name)
    return checked, problems


def _check(
    path: str, block: Mapping[str, Any], kinds: Mapping[str, Kind], problems: list[Problem], relaxed: bool, owner: str | None = None
) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in block.items():
        where = f"{path}.{name}"
        kind = kinds.get(str(name))
        if kind is None:
            near, allowed = closest(str(name), kinds), ", ".join(kinds) if len(kinds) <= 12 else None
            what = f"{where} is not a known entry" + (f" of optimizer {owner}" if owner else "")
            fix = f"write `{near}`, or remove it" if near else "remove it"
            problems.append(Problem(what, allowed=allowed, closest=near, fix=fix, keys=(where,)))
        elif isinstance(kind, Mapping) and isinstance(value, Mapping):
            value = _check(where, value, kind, problems, relaxed)
        elif value is not None and not (relaxed and value == "auto"):
            value, wanted = _fit(value, kind)
            if wanted:
                problems.append(Problem(f"{where} is {shown(value)}", allowed=wanted, fix=_fix_for(value, kind), keys=(where,)))
        checked[name] = value
    return checked


def _fit(value: Any, kind: Kind) -> tuple[Any, str | None]:
    """The value in the kind wanted and None, or the value and what was wanted."""
    number = _is_number(value)
    if isinstance(kind, tuple):
        fitting = str(value).lower()
        return (fitting, None) if fitting in kind else (value, "one of " + ", ".join(kind))
    if isinstance(kind, Mapping):
        return value, DICT
    if kind == INT and number:
        return (int(value), None) if float(value).is_integer() else (value, kind)
    if kind == BETAS:
        good = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(item) and 0 <= item < 1 for item in value)
        return (list(value), None) if good else (value, "two numbers, each >= 0 and < 1")
    fits = {
        BOOL: isinstance(value, bool),
        INT: False,
        NUM: number and value == value,
        STR: isinstance(value, str),
        DICT: isinstance(value, Mapping),
        LIST: isinstance(value, list | tuple),
        ANY: True,
    }
    return value, None if fits[kind] else kind


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fix_for(value: Any, kind: Kind) -> str:
    if kind in (NUM, INT) and isinstance(value, str):
        return "write the number without quotes"
    if isinstance(kind, tuple):
        return f"write {closest(str(value), kind) or kind[0]}"
    return "change the value"
