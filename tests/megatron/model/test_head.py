# SPDX-License-Identifier: Apache-2.0
"""The head's handle: its three readings agree, tied or not, and `read` runs inside the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.model.head import FinalNorm, LMHead, Logits, tied_logits
from megatron.model.layer_state import LayerState
from megatron.model.spec import HeadSpec, NormKind, NormSpec
from megatron.mpu.groups import Group
from megatron.mpu.layers import VocabEmbedding


def test_readings_agree_and_parameters_have_their_names() -> None:
    torch.manual_seed(0)
    tp = Group.single()
    stream = LayerState(torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.int32))
    labels, weights = torch.randint(0, 12, (2, 5)), torch.rand(2, 5)
    norm = FinalNorm(NormSpec(kind=NormKind.RMSNORM, size=8, eps=1e-6), tp=tp)
    spec = HeadSpec(hidden_size=8, vocab_size=12, block_rows=3, multiplier=0.5)
    head = LMHead(spec, tp=tp)
    assert list(norm.state_dict()) == ["norm.scale"] and list(head.state_dict()) == ["final_linear.weight"]
    logits = head(norm(stream))
    full = logits.full()
    assert isinstance(logits, Logits) and logits.block_rows == 3 and full.shape == (2, 5, 12)
    torch.testing.assert_close(full, norm(stream).hidden @ head.final_linear.weight.T * 0.5)
    logps = full.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(logits.token_logps(labels), logps)
    torch.testing.assert_close(logits.token_logps(labels, weights > 0.5), logps * (weights > 0.5))
    torch.testing.assert_close(logits.nll(labels, weights, torch.tensor(7.0)), -(logps * weights).sum() / 7)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = VocabEmbedding(12, 8, tp=tp)

    table = Table()
    table.word_embeddings.weight = head.final_linear.weight

    def read(handle: Logits) -> Tensor:
        return handle.nll(labels, weights, 7.0)

    torch.testing.assert_close(tied_logits(table, norm(stream), spec=spec).full(), full)
    torch.testing.assert_close(tied_logits(table, norm(stream), spec=spec, read=read), head(norm(stream), read))
