# SPDX-License-Identifier: Apache-2.0
"""Rules about what an optimizer needs of the run, and about what a run reports of its gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from ..problems import Problem, plain
from ..resolve import model_ranks
from .rule import Rule, Values, simple, zero_stage


def _is(v: Values, name: str) -> bool:
    return bool(v["optimizer_type"] == name)


def _param(v: Values, name: str, default: Any) -> Any:
    return ((v["optimizer"] or {}).get("params") or {}).get(name, default)


def _stage(v: Values) -> int:
    """The ZeRO stage that runs: bfloat16 without one runs as stage 1, where sums are float32."""
    return zero_stage(v) or int(v["precision"] == "bfloat16")


def _zero_muon(v: Values) -> bool:
    return _is(v, "muon") and _stage(v) >= 1


def _offloads(v: Values) -> bool:
    return ((v["zero_optimization"].get("offload_optimizer") or {}).get("device") or "none") != "none"


# fmt: off
OPTIMIZER_RULES: Final[tuple[Rule, ...]] = (
    simple("optimizer_type", lambda v: _is(v, "onebitadam") and v["train_iters"] is None,
           "onebitadam plans its phases by train_iters, which is not set", "set train_iters", "train_iters optimizer.type"),
    simple("use_mup optimizer_type", lambda v: v["use_mup"] and _is(v, "madgrad_wd"),
           "muP has no law for the learning rate of {optimizer_type}", "use another optimizer, such as adam, or remove use_mup",
           "optimizer.type use_mup"),
    simple("optimizer_type", lambda v: _is(v, "sm3") and _stage(v) >= 1,
           lambda v: "sm3 remembers one number per row and column, but "
                     f"{'bfloat16' if v['precision'] == 'bfloat16' else 'ZeRO'} hands it flat pieces of parameters, which have neither",
           "set precision: fp32 with zero_optimization.stage: 0, or use another optimizer, such as adam",
           "optimizer.type zero_optimization.stage precision"),
    simple("optimizer_type", lambda v: _is(v, "sm3") and v["model_parallel_size"] > 1,
           "sm3 takes maxima over whole rows and columns, but {model_parallel_size} tensor-parallel ranks hold parts of them",
           "set model_parallel_size: 1, or use another optimizer, such as adam", "optimizer.type model_parallel_size"),
    simple("optimizer_type", lambda v: _is(v, "muon") and v["model_parallel_size"] > 1,
           "muon makes whole matrices orthogonal, but {model_parallel_size} tensor-parallel ranks hold slices of them",
           "set model_parallel_size: 1, or use another optimizer, such as adam", "optimizer.type model_parallel_size"),
    simple("optimizer_type", lambda v: _is(v, "muon") and v["precision"] == "fp16",
           "muon does not run in fp16: its momentum is formed before the loss scale is checked", "use precision: bfloat16 or fp32",
           "precision optimizer.type"),
    simple("optimizer_type zero_optimization",
           lambda v: _is(v, "muon") and _stage(v) >= 3 and v["zero_optimization"].get("reduce_scatter", True),
           "at ZeRO stage 3 muon needs whole gradients, but zero_optimization.reduce_scatter is on",
           "set zero_optimization.reduce_scatter: false, or stage: 2",
           "zero_optimization.reduce_scatter optimizer.type zero_optimization.stage"),
    simple("optimizer_type zero_optimization", lambda v: _zero_muon(v) and _offloads(v),
           "muon does not work with zero_optimization.offload_optimizer",
           "remove offload_optimizer, or use another optimizer, such as adam", "optimizer.type zero_optimization.offload_optimizer"),
    simple("optimizer_type gradient_clipping", lambda v: _zero_muon(v) and v["gradient_clipping"] > 0,
           lambda v: f"gradient_clipping {plain(v['gradient_clipping'])}: under ZeRO (bfloat16 is stage 1) DeepSpeed clips what muon has"
                     " made of the gradients, whose size is that of the step, so every step would be cut",
           "set gradient_clipping: 0.0; the size of muon's steps does not depend on the gradient's", "gradient_clipping optimizer.type"),
    simple("optimizer_type", lambda v: _zero_muon(v) and (_param(v, "ns_steps", 5) != 5 or not _param(v, "nesterov", True)),
           "under ZeRO (bfloat16 is stage 1) DeepSpeed runs muon with ns_steps 5 and nesterov true",
           "remove optimizer.params.ns_steps and optimizer.params.nesterov", "optimizer.params.ns_steps optimizer.type"),
)
# fmt: on


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
    keys = tuple(key for key in ("log_grad_norm", "log_grad_pct_zeros") if v[key])
    # In fp32 without ZeRO the optimizer is torch's own, around which DeepSpeed puts none of its.
    if keys and v["pipe_parallel_size"] >= 1 and (v["precision"] != "fp32" or zero_stage(v)):
        yield Problem(
            f"{', '.join(keys)}: DeepSpeed's pipeline engine updates the weights under ZeRO or in half precision without showing gradients",
            fix="set pipe_parallel_size: 0, or remove these keys",
            keys=(*keys, "pipe_parallel_size"),
        )


def _states_are_whole(v: Values) -> bool:
    """Whether DeepSpeed without ZeRO keeps the optimizer's state in one piece, whose parameters cannot be told apart."""
    sums_in_half = v["precision"] == "bfloat16" and (v["data_types"] or {}).get("grad_accum_dtype") == "bf16"
    return zero_stage(v) == 0 and (v["precision"] == "fp16" or sums_in_half)


def _micro_batches(v: Values) -> int:
    """Micro batches of a step, over all data-parallel ranks."""
    return int((v["gradient_accumulation_steps"] or 1) * ((v["global_num_gpus"] or 1) // model_ranks(v)))


# fmt: off
REPORT_RULES: Final[tuple[Rule, ...]] = (
    Rule("log_gradient_noise_scale", _whole_gradients),
    Rule("log_grad_norm log_grad_pct_zeros pipe_parallel_size precision", _gradients_in_sight),
    simple("log_optimizer_states precision", lambda v: v["log_optimizer_states"] and _states_are_whole(v),
           "log_optimizer_states: without ZeRO, DeepSpeed keeps the state of a {precision} optimizer without regard to parameters",
           "set zero_optimization.stage: 1, or remove log_optimizer_states", "log_optimizer_states zero_optimization.stage"),
    simple("log_gradient_noise_scale", lambda v: v["log_gradient_noise_scale"] and _micro_batches(v) < 2,
           "log_gradient_noise_scale compares the gradients of several micro batches, and a step has only one",
           "set gradient_accumulation_steps to 2 or more, or use more data ranks",
           "log_gradient_noise_scale gradient_accumulation_steps"),
    simple("char_level_ppl train_impl", lambda v: v["char_level_ppl"] and v["train_impl"] != "normal",
           "char_level_ppl is a perplexity of text, which train_impl {train_impl} has none of", "remove char_level_ppl"),
)
