# SPDX-License-Identifier: Apache-2.0
"""Losses are means over trained tokens, however these lie in micro batches."""

from __future__ import annotations

import pytest
import torch

from megatron.data.batch import Batch
from megatron.engine.accounting import MetricSum, add_terms, global_denominator, weighted_mean
from megatron.mpu.groups import Group, Groups
from megatron.objectives.base import LossTerms
from megatron.objectives.language_model import LanguageModel

CPU, ONE = torch.device("cpu"), Group.single()
NLL = torch.arange(12.0).view(3, 1, 4)
WEIGHTS = torch.tensor([[[1.0, 1, 1, 1]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]])


def batches() -> list[Batch]:
    """Three micro batches with four, none and one trained token."""
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    return [Batch(tokens=tokens, labels=tokens, loss_weight=weight, segments=tokens.int()) for weight in WEIGHTS]


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
