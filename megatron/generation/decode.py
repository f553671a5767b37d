# SPDX-License-Identifier: Apache-2.0
"""Decoding over token ids, with a cache or without. Knows no tokenizer and no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron.generation.sampling import Sampling, choose
from megatron.model.head import Logits
from megatron.model.layer_state import ModelCache
from megatron.model.transformer import Transformer

OnToken = Callable[[int, int], None]


class NextTokenScorer(Protocol):
    """What decoding needs of a model. longest: tokens it can see; vocab_size: ids that exist"""

    longest: int
    vocab_size: int

    def allocate(self, rows: int, length: int) -> ModelCache:
        """An empty cache for `rows` rows of up to `length` tokens."""
        ...

    def next_logits(self, tokens: Tensor, cache: ModelCache | None) -> Tensor:
        """tokens [b, s], which follow those in the cache -> logits of the token after them, [b, v] float32."""
        ...


class ModelScorer:
    """A Transformer as a NextTokenScorer."""

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
    scorer: NextTokenScorer,
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
    scorer: NextTokenScorer, prompts: Tensor, limit: int, settings: DecodeSettings, generators: Sequence[torch.Generator]
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
