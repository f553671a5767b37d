# SPDX-License-Identifier: Apache-2.0
"""Every op of every family undoes itself, for any sizes and values."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.checkpoint.loading.merge_tp import shapes_of
from megatron.checkpoint.mapping.families import FAMILIES, LEGACY, LEGACY_LLAMA, NEOX_TE, TE, dialect
from megatron.checkpoint.mapping.meta_llama import META_LLAMA
from megatron.checkpoint.mapping.ops import Concat, FuseQKV, OpContext
from megatron.checkpoint.mapping.rows import bound_rows
from megatron.model.spec import ModelSpec
from support.families import family_spec, resized
from support.specs import attention_spec, model_spec

HEAD_DIM = 3
SPOKEN = (dialect(mlp=LEGACY, norms=TE), dialect(mlp=LEGACY_LLAMA), NEOX_TE)  # with all rows that dialects have


def place(heads: int, kv_heads: int, vocab_size: int) -> OpContext:
    sizes = {"hidden_size": heads * HEAD_DIM, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": HEAD_DIM, "rotary": None}
    spec: ModelSpec = model_spec(attention=sizes)
    return OpContext(spec=spec, layer=1, vocab_size=vocab_size)


@settings(deadline=None, max_examples=10)
@given(
    kv_heads=st.integers(1, 3),
    repeat=st.integers(1, 3),
    half=st.integers(1, 3),
    width=st.integers(1, 4),
    vocab_size=st.integers(1, 9),
    padding=st.integers(0, 3),
    tied=st.booleans(),
)
def test_unpack_undoes_pack(kv_heads: int, repeat: int, half: int, width: int, vocab_size: int, padding: int, tied: bool):
    """Every row of every family, for any sizes: foreign tensors of distinct values become ours, of our shape, and themselves again."""
    for family in (*FAMILIES, META_LLAMA, *SPOKEN):
        heads = kv_heads if family.name == "gpt2" else kv_heads * repeat  # one matrix there is three equal parts
        name = family.name if family in FAMILIES else "llama"
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": 2 * half, "width": width}
        spec = resized(family_spec(name), **sizes, vocab_size=vocab_size + padding, tied=tied and family is not META_LLAMA)
        shapes = shapes_of(spec)
        for row in bound_rows(family, spec, vocab_size):
            like = row.op.unpack([torch.zeros(shapes[row.ours])], row.place)
            parts = [torch.rand(part.shape, dtype=torch.float64) for part in like]
            (ours,) = row.op.pack(parts, row.place)
            assert ours.shape == shapes[row.ours] and ours.sum().isclose(sum(part.sum() for part in parts)), (family.name, row.ours)
            back = row.op.unpack([ours], row.place)
            assert len(back) == len(row.theirs)
            assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True)), (family.name, row.ours)


def test_fused_orders():
    """Head by head where every query head has a key head of its own, else all q, all k, all v."""
    q, k, v = (torch.arange(n, dtype=torch.float32) + start for n, start in ((6, 0), (6, 10), (6, 20)))
    (fused,) = FuseQKV().pack([q, k, v], place(2, 2, 64))
    assert fused.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 3, 4, 5, 13, 14, 15, 23, 24, 25]
    (fused,) = FuseQKV().pack([q, k[:3], v[:3]], place(2, 1, 64))
    assert fused.tolist() == [*range(6), 10, 11, 12, 20, 21, 22]


def test_value_comes_before_gate():
    (fused,) = Concat(0, 2).pack([torch.tensor([1.0]), torch.tensor([2.0])], place(2, 2, 64))
    assert fused.tolist() == [1.0, 2.0]
    assert attention_spec().num_heads == 4
