# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: pretraining, and supervised fine-tuning when a label stream says which tokens are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron.data.batch import Batch
from megatron.errors import DataError
from megatron.objectives.base import LossContext, LossTerms, Metric, Objective, Sample, Targets

if TYPE_CHECKING:
    from megatron.model.head import Logits
    from megatron.neox_arguments import NeoXArgs

PAD_TOKEN = 0
"""Written where a stream holds a negative id (padding); never trained and, being at the end, never attended to."""


class LanguageModel(Objective):
    """Mean negative log-likelihood of the next token over the trained tokens of the global batch.

    eod:           id that ends a document
    use_labels:    a "label" stream tells which tokens are trained (a negative label is not)
    isolated:      documents of one row do not see each other
    eod_mask_loss: do not train the position whose input is the end of a document
    """

    def __init__(self, *, eod: int, use_labels: bool = False, isolated: bool = False, eod_mask_loss: bool = False) -> None:
        self.streams: tuple[str, ...] = ("text", "label") if use_labels else ("text",)
        self.eod = eod
        self.use_labels = use_labels
        self.isolated = isolated
        self.eod_mask_loss = eod_mask_loss

    @classmethod
    def from_args(cls, args: NeoXArgs, *, eod: int) -> LanguageModel:
        """The objective as the configuration asks for it."""
        return cls(
            eod=eod,
            use_labels=bool(args.data.train_label_data_paths),
            isolated=args.attention.attention_over_documents == "isolated",
            eod_mask_loss=bool(args.data.eod_mask_loss),
        )

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Rows of s + 1 tokens -> a batch of s positions.

        samples: b items {"text": [s+1], "label": [s+1], "segment_ids": [s+1]}. A negative label is not trained (padding has one), a
        negative text id is padding. Segments are the document numbers; where they are missing, documents are told apart by their end.

        Two documents and the start of a third in one row, 0 ends a document:

        >>> row = {"text": np.array([5, 6, 0, 7, 0, 8, 9])}
        >>> joined = LanguageModel(eod=0).collate([row])
        >>> joined.tokens, joined.labels
        (tensor([[5, 6, 0, 7, 0, 8]]), tensor([[6, 0, 7, 0, 8, 9]]))
        >>> joined.segment_ids.tolist(), joined.loss_weight.tolist()
        ([[0, 0, 0, 0, 0, 0]], [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])

        Isolated, the end token belongs to the document it ends, and nothing is asked to predict the next document's first token:

        >>> alone = LanguageModel(eod=0, isolated=True).collate([row])
        >>> alone.segment_ids.tolist(), alone.loss_weight.tolist()
        ([[0, 0, 0, 1, 1, 2]], [[1.0, 1.0, 0.0, 1.0, 0.0, 1.0]])

        A label stream keeps a prompt (here: 5 6) out of the loss; -1 in the text is padding:

        >>> sft = LanguageModel(eod=0, use_labels=True)
        >>> batch = sft.collate([{"text": np.array([5, 6, 7, 0, -1]), "label": np.array([-100, -100, 7, 0, -100])}])
        >>> batch.tokens.tolist(), batch.loss_weight.tolist()
        ([[5, 6, 7, 0]], [[0.0, 1.0, 1.0, 0.0]])
        """
        text = _rows(samples, "text")
        pad = text < 0
        ends = (text == self.eod) & ~pad
        tokens, labels = text[:, :-1], text[:, 1:]
        trained = ~(pad[:, :-1] | pad[:, 1:])
        if self.use_labels or any("label" in sample for sample in samples):
            wanted = _rows(samples, "label")[:, 1:]
            trained &= wanted >= 0
            labels = np.where(wanted >= 0, wanted, labels)
        if self.eod_mask_loss:
            trained &= ~ends[:, :-1]
        segment_ids = np.zeros(text.shape, np.int32)
        if self.isolated:
            known = all("segment_ids" in sample for sample in samples)
            segment_ids = _rows(samples, "segment_ids").astype(np.int32) if known else document_numbers(ends)
            # The first token of a document is not predicted from the document before it.
            trained &= segment_ids[:, :-1] == segment_ids[:, 1:]
        return Batch(
            tokens=torch.from_numpy(np.where(pad[:, :-1], PAD_TOKEN, tokens)),
            labels=torch.from_numpy(np.where(labels < 0, PAD_TOKEN, labels)),
            loss_weight=torch.from_numpy(trained.astype(np.float32)),
            segment_ids=torch.from_numpy(np.ascontiguousarray(segment_ids[:, :-1])),
            padding=int(pad[:, :-1].sum()),
        )

    def denominators(self, batch: Batch) -> Mapping[str, float]:
        """Trained tokens: the sum of absolute weights."""
        return {"tokens": float(batch.loss_weight.abs().sum())}

    def loss(self, logits: Logits, targets: Targets, context: LossContext) -> LossTerms:
        """sum(weight * nll) / tokens; metric lm_loss is the same number."""
        total = context.sum_ranks(logits.nll(targets["labels"], targets["loss_weight"], 1.0))
        return LossTerms(loss=total / context.denominator("tokens"), metrics={"lm_loss": Metric(total, "tokens")})


def document_numbers(ends: np.ndarray) -> np.ndarray:
    """[b, s] bool, true where a document ends -> [b, s] int32, 0 for the first document of a row, then 1, ...

    >>> document_numbers(np.array([[False, True, True, False]]))
    array([[0, 0, 1, 2]], dtype=int32)
    """
    count = np.cumsum(ends, axis=1, dtype=np.int32)
    return np.asarray(count - ends, dtype=np.int32)


def _rows(samples: Sequence[Sample], stream: str) -> np.ndarray:
    """The named stream of every sample as one int64 array [b, s+1]."""
    if not samples:
        raise DataError("a micro batch without samples", fix="check train_micro_batch_size_per_gpu and the dataset's length")
    missing = [i for i, sample in enumerate(samples) if stream not in sample]
    if missing:
        raise DataError(
            f"samples {missing[:5]} have no {stream!r} stream",
            fix="give label paths for every training path, or for none" if stream == "label" else None,
        )
    lengths = {len(sample[stream]) for sample in samples}
    if len(lengths) != 1:
        raise DataError(f"stream {stream!r}: rows of different lengths {sorted(lengths)} in one micro batch")
    return np.stack([np.asarray(sample[stream], dtype=np.int64) for sample in samples])
