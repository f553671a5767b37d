# SPDX-License-Identifier: Apache-2.0
"""The whole model: names, recomputation, caches, documents, tying."""

from dataclasses import replace

import pytest
import torch

from megatron.model.recompute import Recompute
from megatron.model.spec import BackendName, InitSpec, MLPSpec, ModelSpec, NormKind, Positions, Residual
from megatron.model.transformer import Transformer, layer_plan
from support.specs import HIDDEN, VOCAB, model_spec, norm_spec

FORMS = {
    "neox": model_spec(residual=Residual.PARALLEL),
    "gpt2": model_spec(positions=Positions.LEARNED, tied=True),
    "llama": model_spec(
        norm=norm_spec(NormKind.RMSNORM),
        ffn=MLPSpec(hidden_size=HIDDEN, width=40, activation="swiglu", bias=False),
        attention={"num_kv_heads": 2, "bias": False, "window": 5},
    ),
    "rpe": model_spec(positions=Positions.RPE, residual=Residual.PARALLEL_TIED),
    "alibi": model_spec(positions=Positions.ALIBI, norm=norm_spec(NormKind.SCALENORM)),
    "sinusoidal": model_spec(positions=Positions.SINUSOIDAL, residual=Residual.POST_SUBLAYER),
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def loss_and_gradients(
    model: Transformer, ids: torch.Tensor, segment_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(ids, segment_ids, read=lambda logits: logits.nll(ids.roll(-1, 1), torch.ones(ids.shape), ids.numel()))
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
        ids = tokens(2, 12)
        with torch.no_grad():
            whole = model(ids).full()
            cache = model.allocate_cache(2, 12)
            parts = [model(ids[:, start:end], cache=cache).full() for start, end in ((0, 5), (5, 6), (6, 12))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [BackendName.SDPA, BackendName.EAGER])
def test_rows_of_a_cache_may_have_different_lengths(backend: BackendName):
    """Each row decodes as it does alone: positions, windows and biases are its own, and what follows its prompt is not seen."""
    for form, spec in FORMS.items():
        model = Transformer(with_backend(spec, backend)).eval()
        ids, lengths = tokens(3, 12), torch.tensor([7, 3, 5])
        with torch.no_grad():
            cache = model.allocate_cache(3, 12)
            model(ids[:, :7], cache=cache).full()
            cache.keep(lengths)
            assert cache.lengths.tolist() == [7, 3, 5] and cache.longest == 7
            steps = [
                model(torch.stack([row[at : at + 1] for row, at in zip(ids, lengths + step, strict=True)]), cache=cache).full()
                for step in range(4)
            ]
            for row, length in enumerate(lengths.tolist()):
                alone = model(ids[row : row + 1, : length + 4]).full()[0, length:]
                found = torch.cat([step[row] for step in steps])
                torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5, msg=lambda text, at=f"{form} {row}": f"{at}: {text}")


DOCUMENTS = (0, 7, 8, 15, 20)
"""Where the documents of the packed row below begin and the last one ends; one is a single token."""
MIXED = {
    "gqa, window over documents": model_spec(attention={"num_kv_heads": 2, "window": 3}),
    "mqa, learned": model_spec(positions=Positions.LEARNED, attention={"num_kv_heads": 1}),
    "rpe, window": model_spec(positions=Positions.RPE, attention={"window": 4}),
    "alibi, gqa": model_spec(positions=Positions.ALIBI, attention={"num_kv_heads": 2}),
}


def with_backend(spec: ModelSpec, name: BackendName) -> ModelSpec:
    blocks = tuple(replace(block, mixer=replace(block.attention, backend=name)) for block in spec.blocks)
    return replace(spec, blocks=blocks)


@pytest.mark.parametrize("backend", [BackendName.SDPA, BackendName.EAGER])
def test_documents_of_a_row_do_not_touch(backend: BackendName):
    """In a packed row each document has the logits and the gradients of all parameters that it has alone.

    When its neighbours are replaced they change by nothing at all.
    """
    for form, spec in {**FORMS, **MIXED}.items():
        check_documents(form, Transformer(with_backend(spec, backend)))


def check_documents(form: str, model: Transformer) -> None:
    ids = tokens(1, DOCUMENTS[-1])
    spans = list(zip(DOCUMENTS, DOCUMENTS[1:], strict=False))
    segment_ids = torch.tensor([[number for number, (start, stop) in enumerate(spans) for _ in range(start, stop)]], dtype=torch.int32)

    def of(row: torch.Tensor, marks: torch.Tensor | None, start: int, stop: int) -> list[torch.Tensor]:
        """Logits of a document's tokens and every parameter's gradient of its loss."""
        mask = torch.zeros(row.shape).index_fill(1, torch.arange(start, stop), 1.0)
        handle = model(row, marks)
        loss = handle.nll(row.roll(-1, 1), mask, 1.0)
        return [handle.full()[:, start:stop], *torch.autograd.grad(loss, list(model.parameters()))]

    for start, stop in spans:
        packed = of(ids, segment_ids, start, stop)
        # The last token's label is the next document's first; alone it must be the same.
        alone_row = ids[:, start:stop]
        other = (ids + 1 + torch.arange(ids.shape[1]) % 5) % VOCAB
        other[:, start:stop] = alone_row
        other[:, stop % ids.shape[1]] = ids[:, stop % ids.shape[1]]
        for before, after in zip(packed, of(other, segment_ids, start, stop), strict=True):
            assert torch.equal(before, after), f"{form}: document {start}:{stop} knows its neighbours"
        longer = torch.cat((alone_row, ids[:, stop % ids.shape[1]][:, None]), dim=1)
        alone = of(longer, torch.tensor([[0] * (stop - start) + [1]], dtype=torch.int32), 0, stop - start)
        for before, after in zip(packed, alone, strict=True):
            torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5, msg=lambda text, at=f"{form} {start}:{stop}": f"{at}: {text}")


def test_packed_documents_equal_separate_rows():
    """Loss and all gradients of a batch are the same whether its documents are packed into one row or padded into rows of their own."""
    for spec in {**FORMS, **MIXED}.values():
        model = Transformer(spec)
        ids = tokens(1, DOCUMENTS[-1])
        spans = list(zip(DOCUMENTS, DOCUMENTS[1:], strict=False))
        lengths = [stop - start for start, stop in spans]
        segment_ids = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(lengths))[None].int()
        rows, labels, weights, marks = (
            torch.zeros(len(spans), max(lengths), dtype=kind) for kind in (torch.int64, torch.int64, torch.float32, torch.int32)
        )
        wanted = torch.ones(ids.shape)
        for number, (start, stop) in enumerate(spans):
            wanted[0, stop - 1] = 0.0  # nothing foretells the next document
            rows[number, : stop - start] = ids[0, start:stop]
            labels[number, : stop - start - 1] = ids[0, start + 1 : stop]
            weights[number, : stop - start - 1] = 1.0
            marks[number, stop - start :] = 1
        packed = model(ids, segment_ids).nll(ids.roll(-1, 1), wanted, wanted.sum())
        separate = model(rows, marks).nll(labels, weights, weights.sum())
        torch.testing.assert_close(packed, separate)
        for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (packed, separate)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_recomputation_changes_nothing():
    ids, segment_ids = tokens(2, 12), torch.tensor([[0] * 7 + [1] * 5, [0] * 12], dtype=torch.int32)
    for spec in FORMS.values():
        kept = loss_and_gradients(Transformer(spec), ids, segment_ids)
        for size in (1, 2, 5):
            again = loss_and_gradients(Transformer(spec, recompute=size and Recompute(num_layers=size)), ids, segment_ids)
            assert torch.equal(kept[0], again[0])
            assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_recomputation_repeats_dropout():
    ids = tokens(2, 12)
    pairs = []
    for size in (None, 1):
        model = Transformer(model_spec(hidden_dropout=0.3), recompute=size and Recompute(num_layers=size))
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
