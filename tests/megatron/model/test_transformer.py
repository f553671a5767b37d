# SPDX-License-Identifier: Apache-2.0
"""The whole model: names, recomputation, caches, documents, tying."""

import pytest
import torch

from megatron.model.cache import KVCache
from megatron.model.plan import layer_plan
from megatron.model.spec import InitSpec, MLPSpec, NormKind, Positions, Residual
from megatron.model.transformer import Transformer
from support.specs import HIDDEN, VOCAB, model_spec, norm_spec

FORMS = {
    "neox": model_spec(residual=Residual.PARALLEL),
    "gpt2": model_spec(positions=Positions.LEARNED, tied=True),
    "llama": model_spec(
        norm=norm_spec(NormKind.RMSNORM),
        mlp=MLPSpec(hidden_size=HIDDEN, width=40, activation="swiglu", bias=False),
        attention={"num_kv_heads": 2, "bias": False, "window": 5},
    ),
    "rpe": model_spec(positions=Positions.RPE, residual=Residual.PARALLEL_TIED),
    "alibi": model_spec(positions=Positions.ALIBI, norm=norm_spec(NormKind.SCALENORM)),
    "sinusoidal": model_spec(positions=Positions.SINUSOIDAL, residual=Residual.POST_SUBLAYER),
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def loss_and_gradients(
    model: Transformer, ids: torch.Tensor, segments: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(ids, segments, read=lambda logits: logits.nll(ids.roll(-1, 1), torch.ones(ids.shape), ids.numel()))
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def test_slots_are_layer_numbers_of_the_format():
    for tied in (False, True):
        plan = layer_plan(model_spec(layers=3, tied=tied))
        assert [slot.number for slot in plan] == list(range(8))
        assert [slot.number for slot in plan if slot.layer is None] == [1, 5]
        assert [slot.tie for slot in plan if slot.tie] == (["embed"] * 2 if tied else [])


def test_names():
    names = set(Transformer(FORMS["neox"], device="meta").state_dict())
    block = {
        f"sequential.{slot}.{part}.{kind}"
        for slot in (2, 3)
        for part in (
            "input_layernorm",
            "post_attention_layernorm",
            "attention.query_key_value",
            "attention.dense",
            "mlp.linear1",
            "mlp.linear2",
        )
        for kind in ("weight", "bias")
    }
    ends = {"sequential.0.word_embeddings.weight", "sequential.5.norm.weight", "sequential.5.norm.bias", "sequential.6.final_linear.weight"}
    assert names == block | ends
    assert "sequential.6.final_linear.weight" not in Transformer(FORMS["gpt2"], device="meta").state_dict()


def test_decoding_with_a_cache_equals_the_whole():
    for spec in FORMS.values():
        model = Transformer(spec).eval()
        ids, attention = tokens(2, 12), spec.blocks[0].attention
        with torch.no_grad():
            whole = model(ids).full()
            cache = KVCache.allocate(spec.num_layers, 2, 12, attention.num_kv_heads, attention.head_dim, torch.float32, "cpu")
            parts = [model(ids[:, start:end], cache=cache).full() for start, end in ((0, 5), (5, 6), (6, 12))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_documents_of_a_row_do_not_touch(form: str):
    """A packed row gives each document the logits and gradients it has alone, and a changed neighbour changes nothing."""
    model = Transformer(FORMS[form])
    ids, segments = tokens(1, 12), torch.tensor([[0] * 7 + [1] * 5], dtype=torch.int32)
    packed, alone = model(ids, segments).full(), model(ids[:, 7:]).full()
    torch.testing.assert_close(packed[:, 7:], alone, rtol=1e-4, atol=1e-5)
    other = ids.clone()
    other[:, :7] = (ids[:, :7] + 1) % VOCAB
    gradients = []
    for row in (ids, other):
        logits = model(row, segments).full()[:, 7:]
        gradients.append((logits, torch.autograd.grad(logits.square().sum(), model.sequential["2"].mlp.linear1.weight)[0]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=0, atol=0)


def test_recomputation_changes_nothing():
    ids, segments = tokens(2, 12), torch.tensor([[0] * 7 + [1] * 5, [0] * 12], dtype=torch.int32)
    for spec in FORMS.values():
        kept = loss_and_gradients(Transformer(spec), ids, segments)
        for size in (1, 2, 5):
            again = loss_and_gradients(Transformer(spec, checkpointing=size), ids, segments)
            assert torch.equal(kept[0], again[0])
            assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_recomputation_repeats_dropout():
    ids = tokens(2, 12)
    pairs = []
    for size in (None, 1):
        model = Transformer(model_spec(hidden_dropout=0.3), checkpointing=size)
        torch.manual_seed(9)
        pairs.append(loss_and_gradients(model, ids))
    assert all(torch.equal(a, b) for a, b in zip(pairs[0][1], pairs[1][1], strict=True))


def test_a_tied_head_is_the_embedding():
    model = Transformer(model_spec(tied=True, init=InitSpec(std=0.5)))
    ids = tokens(1, 6)
    logits = model(ids)
    assert logits.weight is model.sequential["0"].word_embeddings.weight
    assert model(ids, read=lambda handle: handle.weight.shape) == (VOCAB, HIDDEN)


def test_all_blocks_share_one_relative_position_table():
    model = Transformer(FORMS["rpe"])
    first, second = (block.attention.rpe for block in model.blocks)
    assert first is second
    assert {f"sequential.{slot}.attention.rpe.weight" for slot in (2, 3)} <= set(model.state_dict())
