# SPDX-License-Identifier: Apache-2.0
"""How many tokens stand for one character in evaluated batches. Knows no tokenizer: it is told how to decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from megatron.data.batch import Batch
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group

PER_CHARACTER = "tokens_per_char"
"""Metric that turns a loss per token into one per character."""


class Characters:
    """Counts the trained tokens of batches that pass, and the characters they decode to.

    decode: ids -> text
    eod:    id that ends a document: a token to be predicted, but no character
    """

    def __init__(self, decode: Callable[[list[int]], str], eod: int) -> None:
        self.decode = decode
        self.eod = eod
        self.tokens = 0
        self.characters = 0

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, unchanged."""
        for batch in batches:
            self._count(batch)
            yield batch

    def per_character(self, dp: Group, device: torch.device) -> float:
        """Tokens per character over all data ranks; 0 when there was no character."""
        tokens, characters = all_reduce(torch.tensor([self.tokens, self.characters], dtype=torch.float64, device=device), dp).tolist()
        return tokens / characters if characters else 0.0

    def _count(self, batch: Batch) -> None:
        trained = batch.loss_weight != 0
        self.tokens += int(trained.sum())
        for labels, kept in zip(batch.labels, trained & (batch.labels != self.eod), strict=True):
            # Neighbours are decoded together: a character may be spread over several tokens.
            self.characters += len(self.decode(labels[kept].tolist()))
