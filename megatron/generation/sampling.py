# SPDX-License-Identifier: Apache-2.0
"""From next-token logits to a token: pure functions. Knows no model, no cache and no random state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. All three at 0 take the most likely one (greedy).

    temperature: divides the logits when > 0
    top_k:       keep the k most likely tokens (0 = all)
    top_p:       keep the smallest set whose probability exceeds p (nucleus sampling, arXiv 1904.09751; 0 = all)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0.0 and self.top_k == 0 and self.top_p == 0.0


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [b, v] with all but the k largest of each row at -inf; ties with the k-th stay."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [b, v] with all but the nucleus at -inf: a token stays while the more likely ones together have at most p."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    chances = ordered.softmax(dim=-1)
    before = chances.cumsum(dim=-1) - chances
    return logits.masked_fill(torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before > p), float("-inf"))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [b, v] -> probabilities [b, v] float32: temperature, then top-k, then top-p."""
    logits = logits.float()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p > 0:
        logits = keep_top_p(logits, sampling.top_p)
    return logits.softmax(dim=-1)


def pick(chances: Tensor, uniform: Tensor) -> Tensor:
    """Draw by the inverse of the distribution function: chances [b, v], uniform [b] in [0, 1) -> tokens [b].

    >>> pick(torch.tensor([[0.25, 0.0, 0.75]] * 3), torch.tensor([0.0, 0.24, 0.25]))
    tensor([0, 0, 2])
    """
    upto = chances.double().cumsum(dim=-1)
    return torch.searchsorted(upto, uniform.double().unsqueeze(-1) * upto[..., -1:], right=True).squeeze(-1)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None = None) -> Tensor:
    """The next token of each row: logits [b, v] -> [b] int64. uniform [b] in [0, 1) unless greedy."""
    if sampling.greedy or uniform is None:
        return logits.argmax(dim=-1)
    return pick(probabilities(logits, sampling), uniform)
