# SPDX-License-Identifier: Apache-2.0
"""Residual forms against their formulas, whole and in tensor parallel shares."""

import pytest
import torch

from megatron.model.block import TransformerBlock, unused_stored_prefixes
from megatron.model.layer_state import LayerState
from megatron.model.spec import MLPSpec, Residual
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group
from support.specs import HIDDEN, model_spec


def build(residual: Residual, *, bias: bool = True, dropout: float = 0.0) -> TransformerBlock:
    mlp = MLPSpec(hidden_size=HIDDEN, width=48, activation="gelu", bias=bias)
    model = Transformer(model_spec(layers=1, residual=residual, ffn=mlp, hidden_dropout=dropout))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.blocks[0]


def stream() -> LayerState:
    torch.manual_seed(1)
    return LayerState(torch.randn(2, 5, HIDDEN), torch.zeros(2, 5, dtype=torch.int32))


@pytest.mark.parametrize("bias", [True, False])  # the reference loses the attention term where the MLP has no bias
@pytest.mark.parametrize("residual", list(Residual))
def test_formula(residual: Residual, bias: bool):
    block = build(residual, bias=bias)
    x, segment_ids, _ = stream()
    ln1, ln2 = getattr(block, "input_layernorm", None), getattr(block, "post_attention_layernorm", None)
    attend = lambda hidden: block.attention(hidden, segment_ids)  # noqa: E731
    if residual is Residual.SEQUENTIAL:
        middle = x + attend(ln1(x))
        expected = middle + block.mlp(ln2(middle))
    elif residual is Residual.PARALLEL:
        expected = x + attend(ln1(x)) + block.mlp(ln2(x))
    elif residual is Residual.PARALLEL_TIED:
        expected = x + attend(ln1(x)) + block.mlp(ln1(x))
    else:
        middle = x + ln2(attend(x))
        expected = middle + block.post_feedforward_layernorm(block.mlp(middle))
    torch.testing.assert_close(block(LayerState(x, segment_ids)).hidden, expected)


@pytest.mark.parametrize("residual", list(Residual))
def test_dropout_hits_both_sublayers(residual: Residual):
    block, (x, segment_ids, _) = build(residual, dropout=0.5), stream()
    torch.manual_seed(0)
    first = block(LayerState(x, segment_ids)).hidden
    assert not torch.equal(first, block(LayerState(x, segment_ids)).hidden)
    assert torch.equal(block.eval()(LayerState(x, segment_ids)).hidden, block(LayerState(x, segment_ids)).hidden)
    # with everything dropped the stream passes unchanged
    block.dropout = 1.0
    assert torch.equal(block.train()(LayerState(x, segment_ids)).hidden, x)


@pytest.mark.parametrize(
    ("residual", "unused"), [(Residual.POST_SUBLAYER, "input_layernorm"), (Residual.PARALLEL_TIED, "post_attention_layernorm")]
)
def test_norms_that_the_reference_stores_unused(residual: Residual, unused: str):
    block = build(residual)
    assert unused_stored_prefixes(block) == (f"{unused}.",)
    state = {**block.state_dict(), f"{unused}.weight": torch.ones(HIDDEN), f"{unused}.bias": torch.zeros(HIDDEN)}
    block.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected"):
        block.load_state_dict({**block.state_dict(), "third_layernorm.weight": torch.ones(HIDDEN)})
    assert unused_stored_prefixes(build(Residual.SEQUENTIAL)) == ()


def test_one_reduce_serves_the_parallel_sum():
    block = build(Residual.PARALLEL)
    assert block.attention.dense.defer_reduce and block.mlp.linear2.defer_reduce
    assert not build(Residual.SEQUENTIAL).mlp.linear2.defer_reduce
    assert isinstance(block.tp, Group)
