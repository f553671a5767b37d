# SPDX-License-Identifier: Apache-2.0
"""Rules about sharing one model among ranks: what must divide by what, and which parts cannot be shared. Starts no process."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import lcm
from typing import Final

from ..problems import Problem, plain
from ..resolve import feed_forward_width
from .model import GATED
from .rule import Rule, Values, divides, simple

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

PARALLEL_RULES: Final[tuple[Rule, ...]] = (
    Rule(f"{_SHARED} seq_length", _chunks),
    Rule(f"{_SHARED} pos_emb attention_dropout attention_backend", _ring),
    Rule("pipe_partition_method pipe_parallel_size num_layers", _cuts),
    Rule("model_parallel_size hidden_size mlp_multiple_of activation", _mlp_width),
    divides("model_parallel_size", "padded_vocab_size"),
    simple(
        "pos_emb pipe_parallel_size",
        lambda v: v["pos_emb"] == "rpe" and v["pipe_parallel_size"] > 1,
        "the table of pos_emb rpe is shared by all layers and cannot be spread over {pipe_parallel_size} pipeline stages",
        "set pipe_parallel_size to 0 or 1, or use another pos_emb",
        "pipe_parallel_size pos_emb",
    ),
)
