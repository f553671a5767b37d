# SPDX-License-Identifier: Apache-2.0
"""Rules about what a run measures of itself and keeps: norms, noise scale, character perplexity, checkpoints. Knows no hook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..problems import Problem
from .rule import Rule, Values, simple

_GRADIENTS: Final = ("log_grad_norm", "log_grad_pct_zeros")


def _stage(v: Values) -> int:
    stage = (v["zero_optimization"] or {}).get("stage")
    return stage if isinstance(stage, int) else 0


def _plain(v: Values) -> bool:
    """Whether the optimizer is torch's own, around which DeepSpeed puts none of its."""
    return v["precision"] == "fp32" and _stage(v) == 0


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
    if v["log_optimizer_states"] and _stage(v) == 0 and (v["precision"] == "fp16" or sums_in_half):
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
