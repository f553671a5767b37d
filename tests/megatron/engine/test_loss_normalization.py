# SPDX-License-Identifier: Apache-2.0
"""Losses are means over trained tokens, however these lie in micro batches."""

from __future__ import annotations

import pytest
import torch

from megatron.data.batch import Batch
from megatron.engine.loss_normalization import MetricSum, add_terms, digest_of, global_denominator, require_same_batch, weighted_mean
from megatron.errors import TrainingError
from megatron.mpu.groups import Group, Groups
from megatron.objectives.base import LossTerms
from megatron.objectives.language_model import LanguageModel
from support.dist import run_distributed

CPU, ONE = torch.device("cpu"), Group.single()
NLL = torch.arange(12.0).view(3, 1, 4)
WEIGHTS = torch.tensor([[[1.0, 1, 1, 1]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]])


def batches() -> list[Batch]:
    """Three micro batches with four, none and one trained token."""
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    return [Batch(tokens=tokens, labels=tokens, loss_weight=weight, segment_ids=tokens.int()) for weight in WEIGHTS]


def terms(objective: LanguageModel, batch: Batch, denominator: torch.Tensor) -> LossTerms:
    """What a model with the losses NLL would give."""
    at = next(number for number, weight in enumerate(WEIGHTS) if weight is batch.loss_weight or torch.equal(weight, batch.loss_weight))
    loss = (NLL[at] * batch.loss_weight).sum() / denominator
    return LossTerms(loss=loss, metrics={"lm_loss": loss})


def mean_over(micro_batches: list[Batch]) -> dict[str, float]:
    meter = MetricSum()
    weight = add_terms(LanguageModel(eod=0), micro_batches, terms, meter, CPU)
    return weighted_mean(meter, weight, Groups.single(), CPU)


def test_evaluation_weighs_micro_batches_by_their_trained_tokens() -> None:
    assert mean_over(batches()) == {"lm_loss": pytest.approx((0 + 1 + 2 + 3 + 9) / 5)}
    assert mean_over(batches()[1:2]) == {"lm_loss": 0.0}


def test_denominator_of_a_step() -> None:
    assert float(global_denominator(LanguageModel(eod=0), batches(), ONE, CPU)) == 5.0
    assert float(global_denominator(LanguageModel(eod=0), batches()[1:2], ONE, CPU)) == 1.0


def on_two_ranks(rank: int, world: int) -> list[str]:
    from megatron.mpu.comm import open_groups
    from megatron.mpu.topology import Topology

    groups = open_groups(Topology(tensor=world), rank)
    require_same_batch(batches(), groups)
    other = batches()
    other[2].segment_ids[0, rank] += 1
    with pytest.raises(TrainingError) as caught:
        require_same_batch(other, groups)
    digests = {digest_of(batches()), digest_of(batches()[:2]), digest_of(other)}
    return [str(caught.value), str(len(digests))]


@pytest.mark.dist
def test_ranks_that_read_different_samples_are_named() -> None:
    """Any difference counts, here one document number."""
    for said, different in run_distributed(on_two_ranks, 2):
        assert "rank 1 reads other samples than rank 0, which is in its tensor parallel group" in said
        assert different == "3"
