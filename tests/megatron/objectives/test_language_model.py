# SPDX-License-Identifier: Apache-2.0
"""The language-model objective against a token-by-token loop and plain cross entropy."""

from __future__ import annotations

import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from megatron.errors import ConfigError, DataError
from megatron.objectives import language_model
from megatron.objectives.base import LossContext
from megatron.objectives.build import objective_class
from megatron.objectives.language_model import LanguageModel

EOD = 0


class DenseLogits:
    """Stands in for the head's handle: the full matrix, plain formulas."""

    def __init__(self, full: Tensor) -> None:
        self.full = full

    def token_logps(self, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.log_softmax(self.full.float(), -1).gather(-1, targets[..., None]).squeeze(-1)

    def nll(self, labels: Tensor, weights: Tensor, denominator: float) -> Tensor:
        return (weights * -self.token_logps(labels)).sum() / denominator


def by_hand(text: list[int], label: list[int] | None, isolated: bool, eod_mask: bool) -> tuple[list[int], list[int], list[float]]:
    """Labels, segment_ids and weights, one position at a time."""
    labels, segment_ids, weights, document = [], [], [], 0
    for i in range(len(text) - 1):
        here, following = text[i], text[i + 1]
        trained = here >= 0 and following >= 0
        target = following
        if label is not None:
            trained = trained and label[i + 1] >= 0
            target = label[i + 1] if label[i + 1] >= 0 else following
        if here == EOD and (isolated or eod_mask):
            trained = False
        labels.append(max(target, 0))
        segment_ids.append(document if isolated else 0)
        weights.append(float(trained))
        if here == EOD:
            document += 1
    return labels, segment_ids, weights


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]] | None]:
    length, count = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    text, label = [], []
    for _ in range(count):
        padding = draw(st.integers(0, length - 1))
        text.append(draw(st.lists(st.integers(0, 4), min_size=length - padding, max_size=length - padding)) + [-1] * padding)
        label.append([t if draw(st.booleans()) and t >= 0 else -100 for t in text[-1]])
    return text, label if draw(st.booleans()) else None


@settings(max_examples=60, deadline=None)
@given(rows(), st.booleans(), st.booleans())
def test_collate_equals_a_loop(data: tuple[list[list[int]], list[list[int]] | None], isolated: bool, eod_mask: bool) -> None:
    text, label = data
    objective = LanguageModel(eod=EOD, use_labels=label is not None, isolated=isolated, eod_mask_loss=eod_mask)
    samples = [{"text": np.array(t)} | ({"label": np.array(label[i])} if label else {}) for i, t in enumerate(text)]
    batch = objective.collate(samples)
    for i, row in enumerate(text):
        labels, segment_ids, weights = by_hand(row, label[i] if label else None, isolated, eod_mask)
        assert batch.tokens[i].tolist() == [max(t, 0) for t in row[:-1]]
        assert (batch.labels[i].tolist(), batch.segment_ids[i].tolist(), batch.loss_weight[i].tolist()) == (labels, segment_ids, weights)
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.loss_weight.dtype, batch.segment_ids.dtype) == (torch.float32, torch.int32)
    assert objective.denominators(batch) == {"tokens": batch.loss_weight.sum().item()}
    assert batch.padding == sum(t < 0 for row in text for t in row[:-1])


def test_document_numbers_of_the_data_win_over_end_tokens() -> None:
    # An end token inside a document does not split it, and a document without one ends all the same.
    row = {"text": np.array([5, EOD, 6, 7, 8, 0]), "segment_ids": np.array([0, 0, 0, 1, 1, 2]), "label": np.array([5, EOD, 6, 7, 8, -100])}
    batch = LanguageModel(eod=EOD, isolated=True).collate([row])
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.loss_weight.tolist() == [[1.0, 1.0, 0.0, 1.0, 0.0]]
    assert LanguageModel(eod=EOD).collate([row]).segment_ids.tolist() == [[0] * 5]


def test_doctests() -> None:
    found = doctest.testmod(language_model)
    assert found.attempted > 5 and found.failed == 0


def test_loss_does_not_depend_on_the_split_into_micro_batches() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    objective = LanguageModel(eod=EOD, use_labels=True)
    text = rng.integers(0, 7, (4, 9))
    label = np.where(rng.random((4, 9)) < 0.5, text, -100)
    label[3] = -100  # a row, and so a micro batch, in which nothing is trained
    samples = [{"text": t, "label": m} for t, m in zip(text, label, strict=True)]
    weight = torch.randn(8, 7, requires_grad=True)

    def run(parts: list[list[int]]) -> tuple[float, Tensor]:
        batches = [objective.collate([samples[i] for i in part]) for part in parts]
        trained = torch.tensor(sum(objective.denominators(b)["tokens"] for b in batches))
        denominators = {"tokens": trained.clamp(min=1)}
        weight.grad, total = None, 0.0
        for b in batches:
            targets = {"labels": b.labels, "loss_weight": b.loss_weight, "segment_ids": b.segment_ids}
            context = LossContext(segment_ids=b.segment_ids, num_documents=b.num_documents, denominators=denominators)
            terms = objective.loss(DenseLogits(weight[b.tokens]), targets, context)  # type: ignore[arg-type]
            terms.loss.backward()
            assert terms.metrics["lm_loss"].over == "tokens"
            total += (terms.metrics["lm_loss"].value / denominators["tokens"]).item()
        assert weight.grad is not None
        return total, weight.grad.clone()

    whole, grad = run([[0, 1, 2, 3]])
    for parts in ([[0, 1], [2, 3]], [[3], [0], [1, 2]], [[0], [1], [2], [3], [3]]):
        value, other = run(parts)
        assert value == pytest.approx(whole, rel=1e-6)
        torch.testing.assert_close(other, grad, rtol=1e-5, atol=1e-7)
    nothing, zero = run([[3]])
    assert nothing == 0.0 and not zero.any()


def test_problems_are_named() -> None:
    with pytest.raises(DataError, match="label"):
        LanguageModel(eod=EOD, use_labels=True).collate([{"text": np.arange(4)}])
    with pytest.raises(DataError, match="different lengths"):
        LanguageModel(eod=EOD).collate([{"text": np.arange(4)}, {"text": np.arange(5)}])
    with pytest.raises(ConfigError, match="train_impl asks for .* not built yet"):
        objective_class("dpo")
    with pytest.raises(ConfigError, match="unknown"):
        objective_class("magic")
    assert objective_class("normal") is LanguageModel


@pytest.mark.parametrize("attention", ["joined", "isolated"])
def test_build_reads_the_sections(attention: str) -> None:
    from megatron.objectives.build import build_objective

    args = SimpleNamespace(
        objective=SimpleNamespace(train_impl="normal", ga_dataset=None, gd_retain_dataset=None),
        attention=SimpleNamespace(attention_over_documents=attention),
        data=SimpleNamespace(train_label_data_paths=["a"], eod_mask_loss=True),
    )
    built = build_objective(args, eod=3)  # type: ignore[arg-type]
    assert isinstance(built, LanguageModel)
    assert (built.eod, built.streams, built.isolated, built.eod_mask_loss) == (3, ("text", "label"), attention == "isolated", True)
    args.objective.gd_retain_dataset = "x"
    with pytest.raises(ConfigError, match="not built yet"):
        build_objective(args, eod=3)  # type: ignore[arg-type]


def test_what_is_trained_is_the_label_not_the_text() -> None:
    """A label stream may ask for another token than the text goes on with."""
    row = {"text": np.array([5, 6, 7, 8, 9]), "label": np.array([5, -100, 7, 4, 9])}
    batch = LanguageModel(eod=0, use_labels=True).collate([row])
    assert batch.tokens.tolist() == [[5, 6, 7, 8]]
    assert [label for label, weight in zip(batch.labels[0].tolist(), batch.loss_weight[0].tolist(), strict=True) if weight] == [7, 4, 9]
