# SPDX-License-Identifier: Apache-2.0
"""Rules about the model's shape and its layers, and about sharing one model among ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import lcm
from typing import Any, Final

from ..problems import Problem, plain, shown
from ..resolve import feed_forward_width
from .rule import Rule, Values, divides, lacks, simple

GATED: Final = ("geglu", "reglu", "swiglu", "bilinear", "glu")
RECURRENT: Final = ("mamba", "rwkv")


def has_layers(v: Values, *names: str) -> bool:
    return any(name in names for name in v["attention_config"] or ())


def _needs_heads(v: Values) -> bool:
    return not has_layers(v, *RECURRENT)


def _head_dim(v: Values) -> int:
    return int(v["head_dim"] or v["hidden_size"] // v["num_attention_heads"])


def _even_heads(v: Values) -> bool:
    return _needs_heads(v) and v["head_dim"] is None


def _required(v: Values) -> Iterable[Problem]:
    for key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if v[key] is None:
            other = " (or seq_length)" if key == "max_position_embeddings" else ""
            yield Problem(f"{key} is not set{other}", allowed="a whole number >= 1", fix=f"add `{key}: N` to a config file", keys=(key,))


def _kv_layers(v: Values) -> Iterable[Problem]:
    if v["num_kv_heads"] >= v["num_attention_heads"]:
        return
    wrong = sorted({name for name in v["attention_config"] or () if name not in ("global", "flash", *RECURRENT)})
    if wrong or v["sparsity_config"]:
        yield Problem(
            f"grouped key/value heads (num_kv_heads {v['num_kv_heads']}) do not work with {', '.join(wrong) or 'sparsity_config'}",
            allowed="layer types global and flash",
            fix="leave num_kv_heads out, or use global or flash layers",
            keys=("num_kv_heads", "attention_config"),
        )


def _rotary(v: Values) -> Iterable[Problem]:
    if v["pos_emb"] != "rotary" or not _needs_heads(v) or (_even_heads(v) and v["hidden_size"] % v["num_attention_heads"]):
        return
    head = _head_dim(v)
    rotated = int(head * v["rotary_pct"])
    if rotated < 2 or rotated % 2:
        yield Problem(
            f"rotary_pct {plain(v['rotary_pct'])} rotates {rotated} of {head} features per head; they are rotated in pairs",
            allowed="a fraction that gives an even number >= 2",
            fix=f"set rotary_pct to {max(2, 2 * round(rotated / 2)) / head:g}" if head >= 2 else "use larger heads",
            keys=("rotary_pct", "num_attention_heads", "hidden_size"),
        )


_ROPE_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "default": (),
}


def _rope_scaling(v: Values) -> Iterable[Problem]:
    block: dict[str, Any] = v["rope_scaling"]
    if v["pos_emb"] != "rotary":
        what = f"rope_scaling works on rotary positions, pos_emb is {v['pos_emb']}"
        yield Problem(what, fix="set pos_emb: rotary", keys=("rope_scaling", "pos_emb"))
    kind = block.get("rope_type", block.get("type"))
    if block.get("rope_type") and block.get("type") and block["rope_type"] != block["type"]:
        keys = ("rope_scaling.rope_type", "rope_scaling.type")
        yield Problem("rope_scaling.rope_type and rope_scaling.type differ", fix="keep rope_type", keys=keys)
    elif kind is None:
        names = ", ".join(_ROPE_NEEDS)
        yield Problem("rope_scaling lacks `rope_type`", allowed=f"one of {names}", fix="add rope_type", keys=("rope_scaling",))
    else:
        missing = ", ".join(name for name in _ROPE_NEEDS.get(kind, ()) if block.get(name) is None)
        if missing:
            yield Problem(f"rope_scaling of type {kind} lacks {missing}", fix=f"add {missing}", keys=("rope_scaling",))
    if block.get("factor") is not None and block["factor"] < 1:
        what, fix = f"rope_scaling.factor is {plain(block['factor'])}", "give the ratio of new to old length"
        yield Problem(what, allowed="a number >= 1", fix=fix, keys=("rope_scaling.factor",))


def _wrong_widths(v: Values) -> bool:
    pattern = v["sliding_window_pattern"]
    return not pattern or any(width is not None and width < 1 for width in pattern)


# Sharing one model among ranks: what must divide by what, and which parts cannot be shared

HEADS: Final = ("num_attention_heads", "num_kv_heads")


def is_ring(v: Values) -> bool:
    """Whether context ranks pass keys round: the heads left by tensor parallelism do not divide by them (as in `mpu.context`)."""
    return any(v[key] // v["model_parallel_size"] % v["context_parallel_size"] for key in HEADS)


def _shares_sequences(v: Values) -> bool:
    """Whether there are context ranks, and heads that tensor ranks can share (else another rule speaks)."""
    return v["context_parallel_size"] > 1 and not any(v[key] % v["model_parallel_size"] for key in HEADS)


def _chunks(v: Values) -> Iterable[Problem]:
    """Context ranks hold equal chunks of a sequence, whose rows tensor ranks may share once more."""
    context, tensor, length = v["context_parallel_size"], v["model_parallel_size"], v["seq_length"]
    if not _shares_sequences(v):
        return
    ring, spread = is_ring(v), bool(v["sequence_parallel"])
    multiple = lcm(context * (2 if ring else 1), context * (tensor if spread else 1))
    if length % multiple:
        form = " with ring attention" if ring else ""
        shared = f", shared by model_parallel_size {tensor} for sequence_parallel" if spread and tensor > 1 else ""
        yield Problem(
            f"seq_length {length} cannot be cut into equal parts for context_parallel_size {context}{form}{shared}",
            allowed=f"a multiple of {multiple}",
            fix=f"set seq_length to {max(1, round(length / multiple)) * multiple}",
            keys=("seq_length", "context_parallel_size"),
        )


def _ring(v: Values) -> Iterable[Problem]:
    """What the ring cannot do, where nothing but a ring serves."""
    context = v["context_parallel_size"]
    if not (_shares_sequences(v) and is_ring(v)):
        return
    lacks = {
        "pos_emb": f"no bias on the scores (pos_emb {v['pos_emb']})" if v["pos_emb"] in ("rpe", "alibi") else None,
        "attention_dropout": f"no dropout (attention_dropout {plain(v['attention_dropout'])})" if v["attention_dropout"] else None,
        "attention_backend": f"no choice of attention_backend ({v['attention_backend']})" if v["attention_backend"] != "auto" else None,
    }
    for key, what in lacks.items():
        if what is not None:
            yield Problem(
                f"the heads of a tensor rank cannot be divided over context_parallel_size {context}, and ring attention has {what}",
                fix="choose a context_parallel_size that divides the heads and key heads of each tensor rank, or 1",
                keys=("context_parallel_size", key),
            )


def _mlp_width(v: Values) -> Iterable[Problem]:
    """Every rank has an equal part; in which sense a gated intermediate_size is meant, a checkpoint may decide."""
    tensor, gated, meant = v["model_parallel_size"], v["activation"] in GATED, v["intermediate_size_convention"]
    if meant == "auto" and v["load"] is None:
        meant = "literal"
    widths = [
        feed_forward_width(
            v["hidden_size"], v["intermediate_size"], v["expansion_factor"], multiple_of=v["mlp_multiple_of"], gated=gated, literal=literal
        )
        for literal in (True, False)
        if meant in ("auto", "literal" if literal else "two_thirds")
    ]
    if all(width % tensor for width in widths):
        key = "expansion_factor" if v["intermediate_size"] is None else "intermediate_size"
        yield Problem(
            f"model_parallel_size {tensor} does not divide the width of the MLP, {widths[0]}",
            fix=f"set mlp_multiple_of to a multiple of {tensor}, or {key} so that the width is one",
            keys=("model_parallel_size", key),
        )


def _cuts(v: Values) -> Iterable[Problem]:
    """Where the pipeline is cut: evenly over layers, over parameters, or over the layers whose class name a regular expression finds."""
    method, stages = v["pipe_partition_method"].lower(), v["pipe_parallel_size"]
    if method in ("uniform", "parameters") or not 0 < stages <= v["num_layers"]:  # too many stages are another rule's
        return
    kind, _, pattern = method.partition(":")
    try:
        found = [name for name in LAYER_CLASSES if kind == "type" and re.search(pattern, name, re.IGNORECASE)]
    except re.error:
        found = []
    count = sum(v["num_layers"] if name == "TransformerBlock" else 1 for name in found)
    if count < stages:
        yield Problem(
            f"pipe_partition_method is {v['pipe_partition_method']!r}"
            + (f", which finds {count} layers for {stages} stages" if kind == "type" else ""),
            allowed=f"uniform, parameters, or type:REGEX on the class names {', '.join(LAYER_CLASSES)}",
            fix="write type:transformer",
            keys=("pipe_partition_method", "pipe_parallel_size"),
        )


LAYER_CLASSES: Final = ("Embedding", "TransformerBlock", "FinalNorm", "LMHead")

_SHARED: Final = "num_attention_heads num_kv_heads model_parallel_size context_parallel_size"

# fmt: off
MODEL_RULES: Final[tuple[Rule, ...]] = (
    Rule("", _required),
    divides("num_attention_heads", "hidden_size", _even_heads),
    divides("num_kv_heads", "num_attention_heads"),
    divides("model_parallel_size", "num_attention_heads", _needs_heads),
    divides("model_parallel_size", "num_kv_heads", _needs_heads),
    divides("model_parallel_size", "hidden_size"),
    divides("model_parallel_size", "moe_num_experts", lambda v: v["moe_num_experts"] > 1),
    divides("model_parallel_size", "seq_length", lambda v: bool(v["sequence_parallel"]) and v["context_parallel_size"] == 1),
    Rule("num_kv_heads num_attention_heads", _kv_layers),
    Rule("rotary_pct hidden_size num_attention_heads", _rotary),
    Rule("rope_scaling", _rope_scaling),
    simple("sliding_window_pattern", _wrong_widths,
           lambda v: f"sliding_window_pattern is {shown(v['sliding_window_pattern'])}", "write for instance [4095, 4095, 4095, null]",
           allowed="at least one entry, each a whole number >= 1 or null"),
    simple("seq_length max_position_embeddings", lambda v: v["seq_length"] > v["max_position_embeddings"],
           "seq_length {seq_length} is greater than max_position_embeddings {max_position_embeddings}",
           "raise max_position_embeddings to {seq_length}, or shorten seq_length"),
    simple("intermediate_size expansion_factor", lambda v: True,
           "intermediate_size {intermediate_size} and expansion_factor {expansion_factor} both set the width of the MLP",
           "keep one of the two"),
    simple("use_separate_qk_norms", lambda v: v["use_separate_qk_norms"] and not v["use_qk_layernorm"],
           "use_separate_qk_norms does nothing without use_qk_layernorm", "add use_qk_layernorm: true",
           "use_separate_qk_norms use_qk_layernorm"),
    simple("qk_norm_each_head", lambda v: v["qk_norm_each_head"] and not v["use_separate_qk_norms"],
           "qk_norm_each_head does nothing without use_separate_qk_norms", "add use_separate_qk_norms: true",
           "qk_norm_each_head use_separate_qk_norms"),
    simple("norm_placement gpt_j_residual", lambda v: v["norm_placement"] == "olmo3" and v["gpt_j_residual"],
           "norm_placement olmo3 and gpt_j_residual are two different block layouts", "keep one of the two"),
    simple("gpt_j_tied", lambda v: v["gpt_j_tied"] and not v["gpt_j_residual"],
           "gpt_j_tied shares the norm of a parallel block, but gpt_j_residual is off",
           "add gpt_j_residual: true, or remove gpt_j_tied", "gpt_j_tied gpt_j_residual"),
    simple("attention_config", lambda v: has_layers(v, "gmlp", "amlp") and v["partition_activations"],
           "gmlp and amlp layers do not work with partition_activations", "set partition_activations: false",
           "partition_activations attention_config"),
    simple("attention_config", lambda v: has_layers(v, *RECURRENT) and (v["hidden_dropout"] or v["attention_dropout"]),
           "mamba and rwkv layers have no dropout, but hidden_dropout is {hidden_dropout} and attention_dropout {attention_dropout}",
           "set both to 0", "hidden_dropout attention_dropout"),
    simple("attention_config model_parallel_size", lambda v: has_layers(v, "rwkv") and v["model_parallel_size"] > 1,
           "rwkv layers cannot be split over {model_parallel_size} tensor-parallel ranks", "set model_parallel_size: 1",
           "model_parallel_size attention_config"),
    simple("moe_top_k moe_num_experts", lambda v: v["moe_top_k"] > v["moe_num_experts"],
           "moe_top_k {moe_top_k} is greater than moe_num_experts {moe_num_experts}", "lower moe_top_k"),
    lacks("use_mup", "mup_base_hidden_size", "use_mup scales from a base width",
          "add mup_base_hidden_size: N, the hidden_size at which the learning rate was found"),
    simple("use_mup init_method", lambda v: v["use_mup"] and "orthogonal" in v["init_method"],
           "muP needs embeddings of one spread at all widths; those of init_method {init_method} depend on it",
           "set init_method: normal; output_layer_init_method may stay", "init_method use_mup"),
    simple("use_mup pos_emb", lambda v: v["use_mup"] and v["pos_emb"] == "rpe",
           "the position bias of pos_emb rpe grows with the head size, which muP forbids", "use another pos_emb", "pos_emb use_mup"),
    simple("coord_check", lambda v: v["coord_check"], "coord_check is a command of its own, not a way to train",
           "run python tools/mup/coord_check.py with this config, and remove coord_check"),
    simple("fp16_lm_cross_entropy precision", lambda v: v["fp16_lm_cross_entropy"] and v["precision"] != "fp16",
           "fp16_lm_cross_entropy needs precision fp16, precision is {precision}", "remove fp16_lm_cross_entropy"),
    simple("pipe_parallel_size num_layers", lambda v: v["pipe_parallel_size"] > v["num_layers"],
           "pipe_parallel_size {pipe_parallel_size} is greater than num_layers {num_layers}",
           "use at most {num_layers} pipeline stages"),
    # Sharing one model among ranks
    Rule(f"{_SHARED} seq_length", _chunks),
    Rule(f"{_SHARED} pos_emb attention_dropout attention_backend", _ring),
    Rule("pipe_partition_method pipe_parallel_size num_layers", _cuts),
    Rule("model_parallel_size hidden_size mlp_multiple_of activation", _mlp_width),
    divides("model_parallel_size", "padded_vocab_size"),
    simple("pos_emb pipe_parallel_size", lambda v: v["pos_emb"] == "rpe" and v["pipe_parallel_size"] > 1,
           "the table of pos_emb rpe is shared by all layers and cannot be spread over {pipe_parallel_size} pipeline stages",
           "set pipe_parallel_size to 0 or 1, or use another pos_emb", "pipe_parallel_size pos_emb"),
)
