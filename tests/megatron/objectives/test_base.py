# SPDX-License-Identifier: Apache-2.0
"""The sums of a loss context against a loop over documents, in one process and where ranks share the rows in either order."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch

from megatron.data import batch
from megatron.data.batch import Extra, ExtraLayout
from megatron.errors import TrainingError
from megatron.mpu.context import ContextKind, ContextPlan
from megatron.objectives.base import REFERENCE, LossContext
from support.dist import run_distributed

LENGTHS = ((5, 4, 3), (1, 11))
"""Tokens of the documents of each row of 12; the third has the number of the first again."""

SEGMENT_IDS = torch.tensor([[at % 2 for at, length in enumerate(row) for _ in range(length)] for row in LENGTHS], dtype=torch.int32)


def sums(rank: int, world: int) -> dict[str, Any]:
    """By each kind of context parallelism: the sums, this rank's gradient of a function of them, and the rows put together again."""
    from megatron.mpu.comm import open_groups
    from megatron.mpu.groups import Topology

    group = open_groups(Topology(context=world), rank).cp
    found = {}
    for kind in ContextKind:
        plan = ContextPlan(group, kind)
        whole = torch.arange(24.0).view(2, 12) / 7
        x = plan.own(whole).requires_grad_()
        context = LossContext(segment_ids=SEGMENT_IDS, num_documents=5, denominators={}, plan=plan)
        documents = context.sum_documents(x)
        loss = (documents.square() * torch.arange(1.0, 6.0)).sum() / context.sum_tokens(x)
        loss.backward()
        found[kind.value] = {
            "documents": documents.detach(),
            "loss": float(loss),
            "gradient": context.gather_tokens(x.grad),
            "whole": torch.equal(context.gather_tokens(plan.own(whole)), whole),
        }
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_sums_and_gradients_are_those_of_whole_documents(world: int) -> None:
    x = (torch.arange(24.0).view(2, 12) / 7).requires_grad_()
    by_hand = torch.stack([part.sum() for row, lengths in zip(x, LENGTHS, strict=True) for part in row.split(lengths)])
    loss = (by_hand.square() * torch.arange(1.0, 6.0)).sum() / x.sum()
    loss.backward()
    for rank in run_distributed(sums, world):
        for found in rank.values():
            torch.testing.assert_close(found["documents"], by_hand.detach())
            torch.testing.assert_close(found["gradient"], x.grad)
            assert found["loss"] == pytest.approx(float(loss)) and found["whole"]


def test_what_is_not_there_is_named() -> None:
    context = LossContext(segment_ids=SEGMENT_IDS, num_documents=5, denominators={"tokens": torch.tensor(2.0)})
    assert float(context.denominator()) == 2.0
    with pytest.raises(TrainingError, match="no denominator 'pairs', only tokens"):
        context.denominator("pairs")
    with pytest.raises(TrainingError, match="no log-probs of the reference"):
        context.reference()
    values = torch.arange(5.0)
    extras = {REFERENCE: Extra(values, ExtraLayout.DOCUMENT)}
    assert LossContext(segment_ids=SEGMENT_IDS, num_documents=5, denominators={}, extras=extras).reference() is values


def test_doctests() -> None:
    found = doctest.testmod(batch)
    assert found.attempted > 2 and found.failed == 0
