# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks are compiled once, whatever documents come, and compute what uncompiled ones do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from megatron.model.spec import BackendName, ModelSpec, Positions
from megatron.model.transformer import Transformer
from support.specs import LENGTH, VOCAB, model_spec

FORMS = {
    "rotary": model_spec(layers=1),
    "learned": model_spec(layers=1, positions=Positions.LEARNED),
    "alibi, window": model_spec(layers=1, positions=Positions.ALIBI, attention={"window": 5}),
}


def with_backend(spec: ModelSpec, name: BackendName) -> ModelSpec:
    return replace(spec, blocks=tuple(replace(block, mixer=replace(block.attention, backend=name)) for block in spec.blocks))


def rows_of_documents(draw: torch.Generator) -> Tensor:
    """Two rows with 0 to 11 borders between documents each, at places of their own."""
    borders = torch.zeros(2, LENGTH, dtype=torch.int32)
    for row in borders:
        count = int(torch.randint(0, 12, (), generator=draw))
        row[torch.randperm(LENGTH - 1, generator=draw)[:count] + 1] = 1
    return borders.cumsum(dim=1).to(torch.int32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", [BackendName.EAGER, BackendName.SDPA])
def test_fifty_batches_of_different_documents_are_one_graph(backend: BackendName, form: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model, plain = (Transformer(with_backend(FORMS[form], backend), seed=3) for _ in range(2))
    for block in model.blocks:
        block.compile(backend=counter)
    draw = torch.Generator().manual_seed(0)
    for number in range(50):
        ids, segment_ids = torch.randint(0, VOCAB, (2, LENGTH), generator=draw), rows_of_documents(draw)
        losses = [one(ids, segment_ids, read=lambda logits, ids=ids: logits.nll(ids, torch.ones(ids.shape), 1.0)) for one in (model, plain)]
        losses[0].backward()
        if number % 10 == 0:
            torch.testing.assert_close(losses[0].detach(), losses[1].detach(), rtol=1e-5, atol=1e-4)
    assert counter.frame_count == 1
