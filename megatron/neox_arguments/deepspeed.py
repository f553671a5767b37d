# SPDX-License-Identifier: Apache-2.0
"""Our sections as DeepSpeed's configuration. DeepSpeed's key names stand in this file alone; it imports no DeepSpeed."""

from __future__ import annotations

from typing import Any

from megatron.errors import ConfigError

from .neox_args import NeoXArgs
from .problems import ConfigProblems, Problem

# Dicts that DeepSpeed alone reads: handed over as they are, under the name they have here.
PASSED_ON = ("data_efficiency", "autotuning", "checkpoint")
PASSED_ON_LOGS = ("flops_profiler", "comms_logger", "csv_monitor", "tensorboard", "wandb")
# What DeepSpeed 0.19 took out and refuses, key -> (section, what to use instead).
REMOVED = {
    "amp": ("optim", "use precision: bfloat16 or fp16"),
    "compression_training": ("optim", "leave it out"),
    "elasticity": ("optim", "give the batch sizes directly"),
    "sparse_attention": ("attention", "use attention_config and sparsity_config"),
    "sparse_gradients": ("optim", "leave it out: embedding gradients are reduced dense"),
}


def deepspeed_config(args: NeoXArgs) -> dict[str, Any]:
    """DeepSpeed's JSON as a dict for `deepspeed.initialize(config=...)`.

    Optimizer and schedule are built by us and handed over as objects.
    Raises ConfigError where `deepspeed_extra_args` says something else than our own keys, and where DeepSpeed
    has no implementation of the combination asked for.
    """
    _refuse_removed(args)
    run, optim, logs = args.run, args.optim, args.logs
    # The progress line says more than DeepSpeed's, so the latter appears only where it was asked for.
    asked = logs.wall_clock_breakdown or args.origin("steps_per_print").kind != "default"
    config: dict[str, Any] = {
        # DeepSpeed counts ranks that share a sequence as data ranks.
        "train_batch_size": (run.train_batch_size or 0) * args.runtime.context_parallel_size or None,
        "train_micro_batch_size_per_gpu": run.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "gradient_clipping": float(optim.gradient_clipping or 0.0),
        "prescale_gradients": optim.prescale_gradients,
        "gradient_predivide_factor": optim.gradient_predivide_factor,
        "steps_per_print": logs.steps_per_print if asked else None,
        "wall_clock_breakdown": logs.wall_clock_breakdown,
        "dump_state": logs.dump_state,
        "zero_optimization": _zero(args),
        # Our optimizers are ordinary torch optimizers: DeepSpeed need not know them by name, offloaded or not.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if (reduce_in := _reduce_dtype(args)) is not None:
        config["communication_data_type"] = reduce_in
    if args.runtime.pipe_parallel_size >= 1:
        # Cutting what stages send among tensor ranks costs a wait for the host each time, and cannot be where they hold different parts.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    passed_on = [(optim, name) for name in PASSED_ON] + [(logs, name) for name in PASSED_ON_LOGS]
    config |= {name: dict(value) for section, name in passed_on if (value := getattr(section, name)) is not None}
    return _with_extra(config | _precision(args), args)


def _refuse_removed(args: NeoXArgs) -> None:
    """One error for all keys in use that DeepSpeed no longer has; a block with `enabled: false` is not in use."""
    problems = []
    for key, (section, fix) in REMOVED.items():
        value = getattr(getattr(args, section), key)
        if value and not (isinstance(value, dict) and value.get("enabled") is False):
            problems.append(Problem(f"DeepSpeed no longer has {key}", where=str(args.origin(key)), fix=fix, keys=(key,)))
    if args.optim.optimizer_type == "onebitadam":
        where = str(args.origin("optimizer.type"))
        problems.append(Problem("DeepSpeed no longer has OneBitAdam", where=where, fix="use type: Adam", keys=("optimizer.type",)))
    if problems:
        raise ConfigProblems(problems)


def _reduce_dtype(args: NeoXArgs) -> str | None:
    """The dtype gradients are summed in; DeepSpeed no longer reads `fp32_allreduce`, so it is said in the newer key."""
    given = args.optim.communication_data_type
    if not args.optim.fp32_allreduce:
        return given
    if given not in (None, "fp32"):
        raise ConfigError(
            f"fp32_allreduce: true contradicts communication_data_type: {given}",
            where=str(args.origin("communication_data_type")),
            fix="keep one of the two",
        )
    return "fp32"


def _precision(args: NeoXArgs) -> dict[str, Any]:
    optim = args.optim
    config: dict[str, Any] = {}
    data_types = dict(optim.data_types) if optim.data_types else {}
    if args.model.precision == "fp16":
        # The four top-level loss-scale keys fill what the dict does not say; a loss_scale of 0 means dynamic.
        config["fp16"] = {
            "loss_scale": optim.loss_scale or 0,
            "loss_scale_window": int(optim.loss_scale_window),
            "hysteresis": optim.hysteresis,
            "min_loss_scale": optim.min_scale,
            **{key: value for key, value in (optim.fp16 or {}).items() if key != "type"},
            "enabled": True,
        }
    elif args.model.precision == "bfloat16":
        config["bf16"] = {**(optim.bf16 or {}), "enabled": True}
        # Always sent, whether the user said it or not.
        data_types = {"grad_accum_dtype": "fp32"} | data_types
    if data_types:
        config["data_types"] = data_types
    return config


def _zero(args: NeoXArgs) -> dict[str, Any]:
    """The ZeRO block. bfloat16 at stage 0 runs as stage 1, where DeepSpeed sums gradients in fp32: the same update, less memory."""
    block = dict(args.optim.zero_optimization or {"stage": 0})
    keeps_bf16_sums = (args.optim.data_types or {}).get("grad_accum_dtype") == "bf16"
    if args.model.precision == "bfloat16" and block.get("stage", 0) == 0 and not keeps_bf16_sums:
        block["stage"] = 1
    return block


def _with_extra(config: dict[str, Any], args: NeoXArgs) -> dict[str, Any]:
    """`config` with deepspeed_extra_args merged in at the top level; a different value for one of our keys is an error."""
    extra = args.optim.deepspeed_extra_args or {}
    ours = {*config, "optimizer", "scheduler"}
    clashes = [key for key, value in extra.items() if key in ours and config.get(key) != value]
    if clashes:
        raise ConfigError(
            "; ".join(f"deepspeed_extra_args.{key} is {extra[key]!r}, but {key} itself says {config.get(key)!r}" for key in clashes),
            where=str(args.origin("deepspeed_extra_args")),
            fix=f"move {', '.join(clashes)} out of deepspeed_extra_args to the top level of the YAML, or drop it",
        )
    return {**config, **extra}
