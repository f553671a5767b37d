# SPDX-License-Identifier: Apache-2.0
"""Rules about what an optimizer needs of the run, and about what a run reports of its gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from ..problems import Problem, plain
from .rule import Rule, Values, simple

ZERO: Final = ("optimizer.type", "zero_optimization.stage")


def _is(v: Values, name: str) -> bool:
    return bool(v["optimizer_type"] == name)


def _param(v: Values, name: str, default: Any) -> Any:
    return ((v["optimizer"] or {}).get("params") or {}).get(name, default)


def _stage(v: Values) -> int:
    """The ZeRO stage that runs: bfloat16 without one runs as stage 1, where sums are float32."""
    stage = (v["zero_optimization"] or {}).get("stage")
    stage = stage if isinstance(stage, int) else 0
    return 1 if stage == 0 and v["precision"] == "bfloat16" else stage


def _zero_muon(v: Values) -> bool:
    return _is(v, "muon") and _stage(v) >= 1


OPTIMIZER_RULES: Final[tuple[Rule, ...]] = (
    simple(
        "onebitadam-length",
        ("optimizer_type",),
        lambda v: _is(v, "onebitadam") and v["train_iters"] is None,
        "onebitadam plans its phases by train_iters, which is not set",
        "set train_iters",
        ("train_iters", "optimizer.type"),
    ),
    simple(
        "mup-and-optimizer",
        ("use_mup", "optimizer_type"),
        lambda v: v["use_mup"] and _is(v, "madgrad_wd"),
        "muP has no law for the learning rate of {optimizer_type}",
        "use another optimizer, such as adam, or remove use_mup",
        ("optimizer.type", "use_mup"),
    ),
    simple(
        "sm3-sees-shapes",
        ("optimizer_type",),
        lambda v: _is(v, "sm3") and _stage(v) >= 1,
        lambda v: (
            "sm3 remembers one number per row and column, but"
            f" {'bfloat16' if v['precision'] == 'bfloat16' else 'ZeRO'} hands it flat pieces of parameters, which have neither"
        ),
        "set precision: fp32 with zero_optimization.stage: 0, or use another optimizer, such as adam",
        (*ZERO, "precision"),
    ),
    simple(
        "sm3-on-one-tensor-rank",
        ("optimizer_type",),
        lambda v: _is(v, "sm3") and v["model_parallel_size"] > 1,
        "sm3 takes maxima over whole rows and columns, but {model_parallel_size} tensor-parallel ranks hold parts of them",
        "set model_parallel_size: 1, or use another optimizer, such as adam",
        ("optimizer.type", "model_parallel_size"),
    ),
    simple(
        "muon-on-one-tensor-rank",
        ("optimizer_type",),
        lambda v: _is(v, "muon") and v["model_parallel_size"] > 1,
        "muon makes whole matrices orthogonal, but {model_parallel_size} tensor-parallel ranks hold slices of them",
        "set model_parallel_size: 1, or use another optimizer, such as adam",
        ("optimizer.type", "model_parallel_size"),
    ),
    simple(
        "muon-in-fp16",
        ("optimizer_type",),
        lambda v: _is(v, "muon") and v["precision"] == "fp16",
        "muon does not run in fp16: its momentum is formed before the loss scale is checked",
        "use precision: bfloat16 or fp32",
        ("precision", "optimizer.type"),
    ),
    simple(
        "muon-and-zero-3",
        ("optimizer_type", "zero_optimization"),
        lambda v: _is(v, "muon") and _stage(v) >= 3 and v["zero_optimization"].get("reduce_scatter", True),
        "at ZeRO stage 3 muon needs whole gradients, but zero_optimization.reduce_scatter is on",
        "set zero_optimization.reduce_scatter: false, or stage: 2",
        ("zero_optimization.reduce_scatter", *ZERO),
    ),
    simple(
        "muon-and-offload",
        ("optimizer_type", "zero_optimization"),
        lambda v: _zero_muon(v) and ((v["zero_optimization"].get("offload_optimizer") or {}).get("device") or "none") != "none",
        "muon does not work with zero_optimization.offload_optimizer",
        "remove offload_optimizer, or use another optimizer, such as adam",
        ("optimizer.type", "zero_optimization.offload_optimizer"),
    ),
    simple(
        "muon-is-not-clipped-under-zero",
        ("optimizer_type", "gradient_clipping"),
        lambda v: _zero_muon(v) and v["gradient_clipping"] > 0,
        lambda v: (
            f"gradient_clipping {plain(v['gradient_clipping'])}: under ZeRO (bfloat16 is stage 1) DeepSpeed clips what muon has made of the"
            " gradients, whose size is that of the step, so every step would be cut"
        ),
        "set gradient_clipping: 0.0; the size of muon's steps does not depend on the gradient's",
        ("gradient_clipping", "optimizer.type"),
    ),
    simple(
        "muon-numbers-under-zero",
        ("optimizer_type",),
        lambda v: _zero_muon(v) and (_param(v, "ns_steps", 5) != 5 or not _param(v, "nesterov", True)),
        "under ZeRO (bfloat16 is stage 1) DeepSpeed runs muon with ns_steps 5 and nesterov true",
        "remove optimizer.params.ns_steps and optimizer.params.nesterov",
        ("optimizer.params.ns_steps", "optimizer.type"),
    ),
)


_GRADIENTS: Final = ("log_grad_norm", "log_grad_pct_zeros")


def _zero_block_stage(v: Values) -> int:
    stage = (v["zero_optimization"] or {}).get("stage")
    return stage if isinstance(stage, int) else 0


def _plain(v: Values) -> bool:
    """Whether the optimizer is torch's own, around which DeepSpeed puts none of its."""
    return v["precision"] == "fp32" and _zero_block_stage(v) == 0


def _asked(v: Values, keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if v[key])


def _whole_gradients(v: Values) -> Iterable[Problem]:
    sizes = {key: v[key] for key in ("pipe_parallel_size", "context_parallel_size") if v[key] > 1}
    if v["log_gradient_noise_scale"] and sizes:
        yield Problem(
            "log_gradient_noise_scale needs the gradient of a micro batch on one rank, where stages and context ranks have parts of it"
            f" ({', '.join(f'{k} {n}' for k, n in sizes.items())})",
            fix="remove it, or set these sizes to 1",
            keys=("log_gradient_noise_scale", *sizes),
        )


def _gradients_in_sight(v: Values) -> Iterable[Problem]:
    keys = _asked(v, _GRADIENTS)
    if keys and v["pipe_parallel_size"] >= 1 and not _plain(v):
        yield Problem(
            f"{', '.join(keys)}: DeepSpeed's pipeline engine updates the weights under ZeRO or in half precision without showing gradients",
            fix="set pipe_parallel_size: 0, or remove these keys",
            keys=(*keys, "pipe_parallel_size"),
        )


def _states_in_sight(v: Values) -> Iterable[Problem]:
    sums_in_half = v["precision"] == "bfloat16" and (v["data_types"] or {}).get("grad_accum_dtype") == "bf16"
    if v["log_optimizer_states"] and _zero_block_stage(v) == 0 and (v["precision"] == "fp16" or sums_in_half):
        yield Problem(
            f"log_optimizer_states: without ZeRO, DeepSpeed keeps the state of a {v['precision']} optimizer without regard to parameters",
            fix="set zero_optimization.stage: 1, or remove log_optimizer_states",
            keys=("log_optimizer_states", "zero_optimization.stage"),
        )


def _several_gradients(v: Values) -> Iterable[Problem]:
    model_ranks = max(v["pipe_parallel_size"], 1) * v["model_parallel_size"] * v["context_parallel_size"]
    parts = (v["gradient_accumulation_steps"] or 1) * ((v["global_num_gpus"] or 1) // model_ranks)
    if v["log_gradient_noise_scale"] and parts < 2:
        yield Problem(
            "log_gradient_noise_scale compares the gradients of several micro batches, and a step has only one",
            fix="set gradient_accumulation_steps to 2 or more, or use more data ranks",
            keys=("log_gradient_noise_scale", "gradient_accumulation_steps"),
        )


REPORT_RULES: Final[tuple[Rule, ...]] = (
    Rule("noise-scale-of-whole-gradients", ("log_gradient_noise_scale",), _whole_gradients),
    Rule("gradients-in-sight", (*_GRADIENTS, "pipe_parallel_size", "precision"), _gradients_in_sight),
    Rule("states-in-sight", ("log_optimizer_states", "precision"), _states_in_sight),
    Rule("noise-scale-of-several", ("log_gradient_noise_scale",), _several_gradients),
    simple(
        "characters-of-text",
        ("char_level_ppl", "train_impl"),
        lambda v: v["char_level_ppl"] and v["train_impl"] != "normal",
        "char_level_ppl is a perplexity of text, which train_impl {train_impl} has none of",
        "remove char_level_ppl",
    ),
)
