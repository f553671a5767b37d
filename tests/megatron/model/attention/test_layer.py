# SPDX-License-Identifier: Apache-2.0
"""Self-attention: back ends agree, documents are alone, cached equals uncached, two ranks equal one, and transformers agrees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.model.attention.layer import SelfAttention
from megatron.model.spec import AttentionSpec, BackendName, NormKind, NormSpec, RopeScaling, RotarySpec, RpeSpec
from megatron.mpu import comm
from megatron.mpu.groups import Group, Topology
from megatron.mpu.sharding import Summed, sharding_of, split
from support.dist import run_distributed

HEADS, DIM = 4, 8
BASE = AttentionSpec(hidden_size=32, num_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM)
NORM = NormSpec(kind=NormKind.RMSNORM, size=32, eps=1e-6)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16)
KINDS: dict[str, dict[str, Any]] = {
    "mha rotary": {"rotary": RotarySpec(dim=DIM)},
    "gqa partial rotary, window": {"num_kv_heads": 2, "rotary": RotarySpec(dim=4), "window": 3, "bias": False},
    "gqa two norms, yarn": {"num_kv_heads": 2, "qk_norm": NORM, "separate_qk_norms": True, "rotary": RotarySpec(dim=DIM, scaling=YARN)},
    "wide heads, each normed, no output bias": {
        "num_kv_heads": 2, "head_dim": 12, "qk_norm": NORM, "separate_qk_norms": True, "norm_each_head": True, "dense_bias": False,
        "rotary": RotarySpec(dim=12),
    },
    "mha each normed": {"qk_norm": replace(NORM, kind=NormKind.LAYERNORM), "separate_qk_norms": True, "norm_each_head": True},
    "mha shared norm": {"qk_norm": replace(NORM, kind=NormKind.LAYERNORM), "softmax_scale": 0.7, "logit_divisor": 3.0},
    "alibi": {"alibi": True},
    "rpe, window": {"rpe": RpeSpec(num_buckets=8, max_distance=20), "window": 4},
}  # fmt: skip
MQA: dict[str, Any] = {"num_kv_heads": 1, "alibi": True, "window": 5}  # cannot be divided over two ranks
EVERY = [*KINDS, "mqa"]


def build(kind: str, tp: Group | None = None, **more: Any) -> SelfAttention:
    """The layer with drawn parameters; the same whole ones at any tp."""
    spec = replace(BASE, **{**KINDS, "mqa": MQA}[kind], **more)
    layer = SelfAttention(spec, tp=tp or Group.single())
    draw = torch.Generator().manual_seed(1)
    whole = SelfAttention(spec, tp=Group.single()) if tp else layer
    table = sharding_of(whole)
    for (name, parameter), (_, mine) in zip(whole.named_parameters(), layer.named_parameters(), strict=True):
        value = torch.randn(parameter.shape, generator=draw) * 0.4
        mine.data.copy_(split(value, table[name], layer.tp.rank, layer.tp.size))
    return layer


def hidden(b: int = 2, s: int = 12) -> Tensor:
    return torch.randn(b, s, 32, generator=torch.Generator().manual_seed(2))


def segment_ids() -> Tensor:
    return torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 12], dtype=torch.int32)


def test_back_ends_agree_and_a_packed_document_is_alone() -> None:
    for kind in EVERY:
        check_back_ends(kind)


def check_back_ends(kind: str) -> None:
    fast, reference = build(kind), build(kind, backend=BackendName.EAGER)
    for marks in (None, segment_ids()):
        outs = [layer(hidden(), marks) for layer in (fast, reference)]
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
        grads = [
            torch.autograd.grad(out.square().mean(), list(layer.parameters())) for out, layer in zip(outs, (fast, reference), strict=True)
        ]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    packed = fast(hidden(), segment_ids())
    torch.testing.assert_close(packed[:1, 5:9], fast(hidden()[:1, 5:9]), rtol=1e-5, atol=1e-5)
    joined = build(kind, isolated=False)
    assert torch.equal(joined(hidden(), segment_ids()), joined(hidden()))


def test_replacing_the_neighbours_changes_nothing() -> None:
    for kind in EVERY:
        check_isolation(kind)


def check_isolation(kind: str) -> None:
    results = []
    for backend in (BackendName.SDPA, BackendName.EAGER):
        for neighbours in (0.0, 1e3):
            layer = build(kind, backend=backend)
            x = hidden()
            x[0, :5] += neighbours
            x[0, 9:] -= neighbours
            x.requires_grad_()
            out = layer(x, segment_ids())[0, 5:9]
            out.square().mean().backward()
            assert (x.grad[0, :5] == 0).all() and (x.grad[0, 9:] == 0).all()
            results.append([out, x.grad[0, 5:9], *(parameter.grad for parameter in layer.parameters())])
        for before, after in zip(*results[-2:], strict=True):
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_cached_decoding_equals_uncached() -> None:
    for kind in EVERY:
        check_cache(kind)


def check_cache(kind: str) -> None:
    for backend in (BackendName.SDPA, BackendName.EAGER):
        layer = build(kind, backend=backend).eval()
        x, marks = hidden(), torch.zeros(2, 12, dtype=torch.int32)
        whole = layer(x, marks)
        cache = layer.allocate_cache(2, 12, x.dtype, "cpu")
        with torch.no_grad():
            pieces = [layer(piece, marks[:, : piece.shape[1]], cache) for piece in x.split([5, 3, 1, 1, 1, 1], dim=1)]
        assert cache.longest == 12 and cache.even and cache.lengths.tolist() == [12, 12]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


def shares(tp: Group) -> dict[str, Any]:
    """Output and gradients of every kind that two ranks can hold, with the reduce deferred or not."""
    out: dict[str, Any] = {}
    for kind in KINDS:
        for defer in (False, True):
            layer = build(kind, tp) if not defer else deferred(kind, tp)
            x = hidden().requires_grad_()
            y = layer(x, segment_ids())
            y = comm.reduce(y, tp) if defer else y
            y.square().mean().backward()
            out[f"{kind} {defer}"] = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return out


def deferred(kind: str, tp: Group) -> SelfAttention:
    layer = build(kind, tp)
    layer.dense.defer_reduce = True
    if layer.dense.bias is not None:
        layer.dense.bias.data /= tp.size
    return layer


def on_two_ranks(rank: int, world: int) -> dict[str, Any]:
    return shares(comm.open_groups(Topology(tensor=world), rank).tp)


@pytest.mark.timeout(120)
def test_two_ranks_equal_one() -> None:
    whole = shares(Group.single())
    ranks = run_distributed(on_two_ranks, 2)
    for case, expected in whole.items():
        kind = case.rpartition(" ")[0]
        table = sharding_of(build(kind))
        for rank, found in enumerate(ranks):
            for name, value in expected.items():
                how = table.get(name)
                mine = value if how is None or isinstance(how, Summed) else split(value, how, rank, 2)
                torch.testing.assert_close(
                    found[case][name], mine, rtol=1e-4, atol=1e-5, msg=lambda text, at=f"{case} {name}": f"{at}: {text}"
                )


def test_names_and_refusals() -> None:
    names = {name for kind in KINDS for name in build(kind).state_dict()}
    assert names == {
        *(f"{layer}.{kind}" for layer in ("query_key_value", "dense") for kind in ("weight", "bias")),
        *("rpe.weight", "alibi_embed.slopes", "qk_layernorm.weight", "qk_layernorm.bias"),
        *(f"{norm}.{kind}" for norm in ("q_norm", "k_norm") for kind in ("scale", "weight", "bias")),
    }
    assert build("mha each normed").state_dict()["q_norm.weight"].shape == (DIM,)
    assert build("mha shared norm").state_dict()["qk_layernorm.weight"].shape == (HEADS, DIM)
    assert build("gqa two norms, yarn").state_dict()["k_norm.scale"].shape == (16,)
    with pytest.raises(ConfigError, match="one norm cannot serve"):
        SelfAttention(replace(BASE, num_kv_heads=2, qk_norm=NORM), tp=Group.single())


def test_dropout_is_for_training_only() -> None:
    layer = build("mha rotary", dropout=0.5)
    assert not torch.equal(layer(hidden()), layer(hidden()))
    layer.eval()
    assert torch.equal(layer(hidden()), layer(hidden()))


def test_equals_transformers_llama() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_scaling=dict(scaling),  # transformers 5 writes into it
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, 0)
    kind = {"kind" if key == "rope_type" else key: value for key, value in scaling.items()}
    spec = replace(BASE, num_kv_heads=2, bias=False, rotary=RotarySpec(dim=DIM, scaling=RopeScaling(**kind)))
    ours = SelfAttention(spec, tp=Group.single())
    ours.query_key_value.weight.data = ours.layout.fuse(theirs.q_proj.weight.data, theirs.k_proj.weight.data, theirs.v_proj.weight.data)
    ours.dense.weight.data = theirs.o_proj.weight.data
    x = hidden(2, 40)
    mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(40)[None])
    torch.testing.assert_close(ours(x), theirs(x, position_embeddings=positions, attention_mask=mask)[0], rtol=1e-5, atol=1e-6)
