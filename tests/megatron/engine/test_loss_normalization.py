# SPDX-License-Identifier: Apache-2.0
"""Losses are means over trained tokens, however these lie in micro batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron.data.batch import Batch, Extra, ExtraLayout
from megatron.engine.loss_normalization import (
    LOSS,
    Evaluation,
    MetricSum,
    contexts,
    digest_of,
    part_of,
    require_same_batch,
    step_totals,
    targets_of,
)
from megatron.errors import TrainingError
from megatron.mpu.context import ContextKind, ContextPlan
from megatron.mpu.groups import Group, Groups
from megatron.objectives.base import LossTerms, Metric
from megatron.objectives.language_model import LanguageModel
from support.dist import run_distributed

CPU, ONE = torch.device("cpu"), Group.single()
NLL = torch.arange(12.0).view(3, 1, 4)
WEIGHTS = torch.tensor([[[1.0, 1, 1, 1]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]])


def batches() -> list[Batch]:
    """Three micro batches with four, none and one trained token."""
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    return [Batch(tokens=tokens, labels=tokens, loss_weight=weight, segment_ids=tokens.int()) for weight in WEIGHTS]


def evaluated(micro_batches: list[Batch]) -> dict[str, float]:
    """What an evaluation makes of a model with the losses NLL."""
    evaluation = Evaluation(LanguageModel(eod=0), CPU)
    context_of = contexts(evaluation.denominators, ContextPlan())
    for batch in evaluation.counted(micro_batches):
        targets = targets_of(batch, CPU)
        at = next(number for number, weight in enumerate(WEIGHTS) if torch.equal(weight, batch.loss_weight))
        evaluation.read(GivenLosses(NLL[at]), targets, context_of(batch, targets))  # type: ignore[arg-type]
    return evaluation.metrics(Groups.single())


@dataclass
class GivenLosses:
    """Stands in for the head's handle."""

    losses: torch.Tensor

    def nll(self, labels: torch.Tensor, weights: torch.Tensor, denominator: float) -> torch.Tensor:
        return (self.losses * weights).sum() / denominator


def test_evaluation_weighs_micro_batches_by_their_trained_tokens() -> None:
    assert evaluated(batches()) == {"lm_loss": pytest.approx((0 + 1 + 2 + 3 + 9) / 5)}
    assert evaluated(batches()[1:2]) == {"lm_loss": 0.0}


def test_totals_of_a_step() -> None:
    """Denominators by name, and what is consumed: samples as the data gave them, tokens and padding."""
    pair = replace(batches()[0], samples=0, padding=3)
    totals = step_totals(LanguageModel(eod=0), [*batches(), pair], ONE, CPU)
    assert {name: float(value) for name, value in totals.denominators.items()} == {"tokens": 9.0}
    assert totals.consumed.tolist() == [3.0, 16.0, 3.0]
    assert float(step_totals(LanguageModel(eod=0), batches()[1:2], ONE, CPU).denominators["tokens"]) == 1.0
    with pytest.raises(TrainingError, match="without micro batches"):
        step_totals(LanguageModel(eod=0), [], ONE, CPU)


def test_metrics_name_their_denominator_or_are_maxima() -> None:
    meter = MetricSum({"tokens": torch.tensor(4.0), "pairs": torch.tensor(2.0)})
    for value in (1.0, 3.0):
        x = torch.tensor(value)
        metrics = {"lm_loss": Metric(x), "margin": Metric(x, "pairs"), "rows": Metric(x, None), "largest": Metric(x, None, maximum=True)}
        meter.add(LossTerms(x, metrics))
    metrics, others = meter.reduce(Groups.single(), CPU, both=torch.tensor([5.0, 2.0**24 + 1], dtype=torch.float64), missing=None)
    assert metrics == {LOSS: 4.0, "lm_loss": 1.0, "margin": 2.0, "rows": 4.0, "largest": 3.0}
    assert others == {"both": [5.0, 2.0**24 + 1]}


def extras_refused() -> Iterator[tuple[Any, str]]:
    yield torch.ones(2, 4), "does not say its layout"
    yield Extra(torch.ones(2, 3), ExtraLayout.TOKEN), r"must be \[2, 4\], got \[2, 3\]"
    yield Extra(torch.ones(2, 4), ExtraLayout.ROW), r"must be \[2\], got \[2, 4\]"
    yield Extra(torch.ones(2), ExtraLayout.DOCUMENT), r"must be \[3\], got \[2\]"


@pytest.mark.parametrize(("extra", "said"), list(extras_refused()), ids=["no layout", "token", "row", "document"])
def test_an_extra_that_does_not_fit_its_layout_is_refused(extra: Any, said: str) -> None:
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    segment_ids = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.int32)
    with pytest.raises(TrainingError, match=said):
        Batch(tokens=tokens, labels=tokens, loss_weight=tokens.float(), segment_ids=segment_ids, extras={"rewards": extra})


def test_cutting_a_batch_cuts_what_counts_tokens() -> None:
    tokens = torch.arange(16).view(2, 8)
    segment_ids = torch.tensor([[0] * 8, [0] * 3 + [1] * 5], dtype=torch.int32)
    extras = {
        "token": Extra(tokens[..., None].float().expand(2, 8, 3), ExtraLayout.TOKEN),
        "row": Extra(torch.tensor([1.0, 2.0]), ExtraLayout.ROW),
        "document": Extra(torch.tensor([1.0, 2.0, 3.0]), ExtraLayout.DOCUMENT),
    }
    batch = Batch(tokens=tokens, labels=tokens, loss_weight=tokens.float(), segment_ids=segment_ids, extras=extras, samples=1)
    part = part_of(batch, ContextPlan(Group(1, 2), ContextKind.RING))
    assert part.tokens.tolist() == part.extras["token"].values[..., 2].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert part.extras["row"] is extras["row"] and part.extras["document"] is extras["document"]
    assert (part.num_documents, part.num_samples) == (3, 1)


def on_two_ranks(rank: int, world: int) -> list[str]:
    from megatron.mpu.comm import open_groups
    from megatron.mpu.groups import Topology

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
