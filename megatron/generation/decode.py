# SPDX-License-Identifier: Apache-2.0
"""Decoding over token ids, with a cache or without, and how each token is chosen from its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron.model.head import Logits
from megatron.model.layer_state import ModelCache
from megatron.model.transformer import Transformer


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


OnToken = Callable[[int, int], None]


class ModelScorer:
    """A Transformer as decoding needs it."""

    def __init__(self, model: Transformer, *, longest: int, vocab_size: int) -> None:
        """longest: `seq_length`; vocab_size: without the rows that only pad the embedding."""
        self.model = model
        self.longest = longest
        self.vocab_size = vocab_size
        some = next(model.parameters())
        self.device, self.dtype = some.device, some.dtype

    def allocate(self, rows: int, length: int) -> ModelCache:
        """An empty cache for `rows` rows of up to `length` tokens."""
        return self.model.allocate_cache(rows, length, self.dtype)

    def next_logits(self, tokens: Tensor, cache: ModelCache | None) -> Tensor:
        """tokens [b, s] -> [b, v] float32; only the last position meets the head."""
        logits: Tensor = self.model(tokens.to(self.device), cache=cache, read=_last)
        # Rows that pad the embedding are no tokens and must never be drawn.
        return logits[:, : self.vocab_size].float()


def _last(logits: Logits) -> Tensor:
    last: Tensor = replace(logits, hidden=logits.hidden[:, -1:]).full()[:, 0]
    return last


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How a text goes on and when it ends.

    maximum_tokens: tokens to add at most; None = as many as the model can see
    eod:            token that ends a text
    stop:           sequences of tokens that end it as well
    recompute:      run the whole context for every token instead of using a cache
    keep_logits:    keep the logits each token was chosen from
    """

    sampling: Sampling = field(default_factory=Sampling)
    maximum_tokens: int | None = 64
    eod: int
    stop: tuple[tuple[int, ...], ...] = ()
    recompute: bool = False
    keep_logits: bool = False


@dataclass
class Completion:
    """One row's new tokens. finished: it ended by eod or a stop sequence, which `ids` leaves out. logits: [v] each"""

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    logits: list[Tensor] = field(default_factory=list)

    def add(self, token: int, settings: DecodeSettings) -> bool:
        """Take one more token; True if it belongs to the text."""
        if token == settings.eod:
            self.finished = True
            return False
        self.ids.append(token)
        for sequence in settings.stop:
            if sequence and tuple(self.ids[-len(sequence) :]) == sequence:
                self.finished = True
                del self.ids[-len(sequence) :]
                return False
        return True


@torch.inference_mode()
def decode(
    scorer: ModelScorer,
    prompts: Tensor,
    settings: DecodeSettings,
    generators: Sequence[torch.Generator],
    on_token: OnToken | None = None,
) -> list[Completion]:
    """Continue prompts of one length: [b, s] int64 with 1 <= s < scorer.longest -> b completions.

    generators: one per row, on the CPU, so that a row's text does not depend on its neighbours; unused when greedy
    on_token:   called with (row, token) for every token kept

    A text ends at eod, at a stop sequence, after maximum_tokens, or when prompt and text fill `scorer.longest`.
    """
    rows, length = prompts.shape
    room = scorer.longest - length
    limit = room if settings.maximum_tokens is None else min(room, settings.maximum_tokens)
    done = [Completion() for _ in range(rows)]
    for logits, tokens in _steps(scorer, prompts, limit, settings, generators):
        for row, token in enumerate(tokens.tolist()):
            if done[row].finished:
                continue
            kept = done[row].add(token, settings)
            if kept and settings.keep_logits:
                done[row].logits.append(logits[row].cpu())
            if kept and on_token is not None:
                on_token(row, token)
        if all(completion.finished for completion in done):
            break
    for completion in done:
        del completion.logits[len(completion.ids) :]  # those of a stop sequence
    return done


def _steps(
    scorer: ModelScorer, prompts: Tensor, limit: int, settings: DecodeSettings, generators: Sequence[torch.Generator]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [b, v] and tokens [b], `limit` times at most."""
    if limit <= 0:
        return
    rows, length = prompts.shape
    cache = None if settings.recompute else scorer.allocate(rows, length + limit)
    context = fresh = prompts
    for _ in range(limit):
        logits = scorer.next_logits(context if cache is None else fresh, cache)
        uniform = None
        if not settings.sampling.greedy:
            uniform = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(logits.device)
        tokens = choose(logits, settings.sampling, uniform)
        yield logits, tokens
        fresh = tokens.unsqueeze(1)
        if cache is None:
            context = torch.cat([context, fresh.to(context.device)], dim=1)
