# SPDX-License-Identifier: Apache-2.0
"""Objectives that are no token mean, written as a user would write them: over documents, and DPO on packed pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.data.batch import Batch, Extra, ExtraLayout
from megatron.objectives.base import REFERENCE, LossContext, LossTerms, Metric, Objective, Sample, Scorer, Targets

ANCHOR = "anchor"


def document_logps(logits: Any, targets: Targets, context: LossContext) -> Tensor:
    """Log-prob of each document [n]."""
    weights = targets["loss_weight"]
    return context.sum_documents(logits.token_logps(targets["labels"], weights != 0) * weights)


class _WithoutData(Objective):
    """What the tests' objectives have in common: their batches are made by hand."""

    streams: tuple[str, ...] = ("text",)

    @classmethod
    def from_args(cls, args: Any, *, eod: int) -> Objective:
        """Nothing is configured."""
        return cls()

    def collate(self, samples: Sequence[Sample]) -> Batch:
        raise NotImplementedError


class DocumentMean(_WithoutData):
    """Mean over documents of (mean token loss of the document - its mean over the whole step before it) ** 2 + mean token loss.

    Tokens are weighed by the extra "advantages" too. The mean over the step is known by a scoring pass of all micro batches and ranks.
    """

    def denominators(self, batch: Batch) -> Mapping[str, float]:
        """Documents with trained tokens."""
        return {"tokens": float(batch.loss_weight.sum()), "documents": float(trained_documents(batch).sum())}

    def prepare(self, micro_batches: Sequence[Batch], scorer: Scorer) -> Sequence[Batch]:
        """Add the mean as one value per row."""
        scores = torch.stack([values.sum() for values in scorer.score(micro_batches, self._losses)]).sum()
        count = torch.tensor(sum(self.denominators(batch)["documents"] for batch in micro_batches))
        total, count = scorer.sum_over_data(torch.stack([scores, count]))
        anchor = float(total / count)

        def with_anchor(batch: Batch) -> Batch:
            values = torch.full((batch.tokens.shape[0],), anchor)
            return replace(batch, extras={**batch.extras, ANCHOR: Extra(values, ExtraLayout.ROW)})

        return [with_anchor(batch) for batch in micro_batches]

    def loss(self, logits: Any, targets: Targets, context: LossContext) -> LossTerms:
        """See the class."""
        losses = self._losses(logits, targets, context)
        trained = context.sum_documents(targets["loss_weight"]) > 0
        far = torch.where(trained, (losses - targets[ANCHOR][0]) ** 2, 0.0)
        total = (far + losses).sum()
        metrics = {
            "document_loss": Metric(losses.sum(), "documents"),
            "lm_loss": Metric(context.sum_tokens(-logits.token_logps(targets["labels"]) * targets["loss_weight"])),
            "largest": Metric(losses.max(), None, maximum=True),
        }
        return LossTerms(total / context.denominator("documents"), metrics)

    def _losses(self, logits: Any, targets: Targets, context: LossContext) -> Tensor:
        weights = targets["loss_weight"]
        sums = context.sum_documents(-logits.token_logps(targets["labels"], weights != 0) * weights * targets["advantages"])
        return sums / context.sum_documents(weights).clamp(min=1.0)


@dataclass
class DPO(_WithoutData):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7) on pairs whose two documents lie anywhere in a micro batch.

    Extras per document: "pair", its number within the micro batch, and "side": 1 chosen, -1 rejected, 0 padding.
    reference: log-probs of each row's documents by a frozen model; `remember` fills it
    """

    beta: float = 0.3
    reference: dict[bytes, Tensor] = field(default_factory=dict)

    def remember(self, batches: Sequence[Batch], scorer: Scorer) -> None:
        """Score the reference, which is the model as it is now."""
        for batch, scores in zip(batches, scorer.score(batches, document_logps), strict=True):
            self.reference[_key(batch)] = scores

    def denominators(self, batch: Batch) -> Mapping[str, float]:
        """Pairs."""
        return {"tokens": float(batch.loss_weight.sum()), "pairs": float((batch.extras["side"].values > 0).sum())}

    def prepare(self, micro_batches: Sequence[Batch], scorer: Scorer) -> Sequence[Batch]:
        """Add the reference's log-probs."""

        def with_reference(batch: Batch) -> Batch:
            values = Extra(self.reference[_key(batch)], ExtraLayout.DOCUMENT)
            return replace(batch, extras={**batch.extras, REFERENCE: values})

        return [with_reference(batch) for batch in micro_batches]

    def loss(self, logits: Any, targets: Targets, context: LossContext) -> LossTerms:
        """-log sigmoid(beta * margin), the margin against the reference."""
        side, pair = targets["side"], targets["pair"]
        ratios = document_logps(logits, targets, context) - context.reference()
        margins = self.beta * torch.zeros_like(ratios).index_add(0, pair, side * ratios)[pair]
        chosen = side > 0
        total = -(F.logsigmoid(margins) * chosen).sum()
        metrics = {
            "accuracy": Metric(((margins > 0) & chosen).sum().float(), "pairs"),
            "dpo_loss": Metric(total, "pairs"),
            "margin": Metric((margins * chosen).sum(), "pairs"),
        }
        return LossTerms(total / context.denominator("pairs"), metrics)


class RowMean(_WithoutData):
    """Mean over rows that was written without the context: right on one rank only."""

    def denominators(self, batch: Batch) -> Mapping[str, float]:
        """Rows."""
        return {"rows": float(batch.tokens.shape[0])}

    def loss(self, logits: Any, targets: Targets, context: LossContext) -> LossTerms:
        """Sums what this rank has."""
        rows = (logits.token_logps(targets["labels"]) * targets["loss_weight"]).sum(-1)
        return LossTerms(-rows.mean(), {})


def trained_documents(batch: Batch) -> Tensor:
    """Which documents of a batch have trained tokens [n]."""
    return (
        LossContext(segment_ids=batch.segment_ids, num_documents=batch.num_documents, denominators={}).sum_documents(batch.loss_weight) > 0
    )


def _key(batch: Batch) -> bytes:
    return hashlib.blake2b(batch.tokens.numpy().tobytes() + batch.segment_ids.numpy().tobytes()).digest()


# ---- batches -----------------------------------------------------------------------------------------------------

LENGTH, PAIRS, VOCAB = 32, 8, 100


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Token ids of the chosen and the rejected document of each pair, 5 to 8 tokens each."""
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(5, 9, (PAIRS, 2), generator=draw).tolist()
    return [(torch.randint(1, VOCAB, (a,), generator=draw), torch.randint(1, VOCAB, (b,), generator=draw)) for a, b in lengths]


def batch_of(rows: Sequence[Sequence[tuple[int, int]]]) -> Batch:
    """Rows of LENGTH tokens. rows: documents (pair, side 0 | 1) of each row; the rest of a row is padding, a document of its own."""
    documents = pairs()
    numbers = {pair: at for at, pair in enumerate(dict.fromkeys(pair for row in rows for pair, _ in row))}
    tokens, labels = torch.zeros(2, len(rows), LENGTH, dtype=torch.int64)
    weight, segment_ids = torch.zeros(len(rows), LENGTH), torch.zeros(len(rows), LENGTH, dtype=torch.int32)
    sides, places, padding = [], [], 0
    for number, row in enumerate(rows):
        at = 0
        for place, (pair, side) in enumerate(row):
            ids = documents[pair][side]
            end = at + len(ids)
            tokens[number, at:end], labels[number, at : end - 1], weight[number, at : end - 1] = ids, ids[1:], 1.0
            segment_ids[number, at:end] = place
            sides.append(-1.0 if side else 1.0)
            places.append(numbers[pair])
            at = end
        if at < LENGTH:
            segment_ids[number, at:] = len(row)
            sides.append(0.0)
            places.append(0)
            padding += LENGTH - at
    extras = {
        "pair": Extra(torch.tensor(places), ExtraLayout.DOCUMENT),
        "side": Extra(torch.tensor(sides), ExtraLayout.DOCUMENT),
        # A number of the token, so that packing moves it along.
        "advantages": Extra(1.0 + (tokens % 7).float() / 7, ExtraLayout.TOKEN),
    }
    return Batch(
        tokens=tokens, labels=labels, loss_weight=weight, segment_ids=segment_ids, extras=extras, samples=len(numbers), padding=padding
    )


def packed(rows_per_batch: int) -> list[Batch]:
    """Two pairs a row."""
    rows = [[(pair, side) for pair in (first, first + 1) for side in (0, 1)] for first in range(0, PAIRS, 2)]
    return [batch_of(rows[at : at + rows_per_batch]) for at in range(0, len(rows), rows_per_batch)]


def padded(pairs_per_batch: int) -> list[Batch]:
    """A row for each document."""
    rows = [[[(pair, side)] for side in (0, 1)] for pair in range(PAIRS)]
    return [batch_of([row for pair in rows[at : at + pairs_per_batch] for row in pair]) for at in range(0, PAIRS, pairs_per_batch)]
