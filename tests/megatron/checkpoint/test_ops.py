# SPDX-License-Identifier: Apache-2.0
"""Every op of every family undoes itself, for any sizes and values."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.checkpoint.families.registry import FAMILIES
from megatron.checkpoint.ops import Chain, Concat, FuseQKV, Op, PadVocab, Place, Transpose
from megatron.model.spec import ModelSpec
from support.specs import attention_spec, model_spec

HEAD_DIM = 3


def place(heads: int, kv_heads: int, vocab_size: int) -> Place:
    sizes = {"hidden_size": heads * HEAD_DIM, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": HEAD_DIM, "rotary": None}
    spec: ModelSpec = model_spec(attention=sizes)
    return Place(spec=spec, layer=1, vocab_size=vocab_size)


def innermost(op: Op) -> Op:
    return op.ops[-1] if isinstance(op, Chain) else op


def theirs(op: Op, count: int, bias: bool, at: Place) -> list[torch.Tensor]:
    """Distinct values in the shapes that a row with this op has on the other side."""
    attention = at.spec.blocks[0].attention
    width = (5,) if not bias else ()
    rows = [7] * count
    if isinstance(innermost(op), FuseQKV):
        q, kv = attention.num_heads * HEAD_DIM, attention.num_kv_heads * HEAD_DIM
        rows = [q, kv, kv] if count == 3 else [q + 2 * kv]
    if isinstance(op, PadVocab):
        rows = [at.vocab_size]
    parts, start = [], 0
    for size in rows:
        shape = (size, *width)
        whole = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        start += whole.numel()
        transposed = isinstance(op, Transpose) or (isinstance(op, Chain) and isinstance(op.ops[0], Transpose))
        parts.append(whole.t().contiguous() if transposed else whole)
    return parts


@settings(deadline=None, max_examples=25)
@given(kv_heads=st.integers(1, 3), repeat=st.integers(1, 3), vocab_size=st.integers(1, 64), bias=st.booleans())
def test_unpack_undoes_pack(kv_heads: int, repeat: int, vocab_size: int, bias: bool):
    for family in FAMILIES:
        for row in family.rows:
            at = place(kv_heads if family.name == "gpt2" else kv_heads * repeat, kv_heads, vocab_size)
            parts = theirs(row.op, 1 if isinstance(row.theirs, str) else len(row.theirs), bias and not isinstance(row.op, PadVocab), at)
            packed = row.op.pack(parts, at)
            assert len(packed) == 1
            back = row.op.unpack(packed, at)
            assert len(back) == len(parts) and all(torch.equal(a, b) for a, b in zip(back, parts, strict=True)), (family.name, row.ours)


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
