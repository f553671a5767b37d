# SPDX-License-Identifier: Apache-2.0
"""When the model is evaluated on the validation and test data, and how the result is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from megatron.data.batch import Batch
from megatron.engine.base import Engine, StepResult
from megatron.hooks.base import Hook, TrainState, Verdict
from megatron.log import get_logger
from megatron.mpu.comm import all_reduce
from megatron.mpu.groups import Group
from megatron.progress import EvaluationBlock, format_evaluation, perplexity

log = get_logger(__name__)

Evaluate = Callable[[str, int], Mapping[str, float] | None]
"""(split "valid" | "test", number of batches) -> metrics, the same on every rank; None = broken off. Called on all ranks."""

Report = Callable[[str, TrainState, Mapping[str, float]], None]


@dataclass(kw_only=True, eq=False)
class ValidationHook(Hook):
    """Evaluates every `interval` steps, and after the last step on both splits.

    interval: steps between passes; 0 = only at the end
    at_start: also before the first step of a fresh run, so that a run's gain can be seen
    report:   who else wants the results (split, state, metrics)
    """

    evaluate: Evaluate
    interval: int
    iters: int
    valid: bool
    test: bool
    at_start: bool = True
    report: Report | None = None
    _last: tuple[int, Mapping[str, float]] | None = field(default=None, init=False)

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """Validate the model as it was initialised or loaded."""
        if self.valid and self.at_start and self.interval and state.iteration == 0:
            self._validate(state)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Validate every `interval` steps."""
        if self.valid and self.interval and state.iteration % self.interval == 0:
            self._validate(state)
        return Verdict.CONTINUE

    def on_stop(self, state: TrainState, engine: Engine) -> None:
        """The final passes; a run that was stopped early leaves at once."""
        if state.iteration < state.target:
            return
        if self.valid:
            known = self._last[1] if self._last is not None and self._last[0] == state.iteration else self._run("valid", state)
            _show("validation", "the end of training for val data", known)
        if self.test:
            _show("test", "the end of training for test data", self._run("test", state))

    def _validate(self, state: TrainState) -> None:
        metrics = self._run("valid", state)
        self._last = None if metrics is None else (state.iteration, metrics)
        _show("validation", f"iteration {state.iteration}", metrics)

    def _run(self, split: str, state: TrainState) -> Mapping[str, float] | None:
        found = self.evaluate(split, self.iters)
        if found is None:
            return None
        metrics = with_perplexity(found)
        if self.report is not None:
            self.report(split, state, metrics)
        return metrics


def with_perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """lm_loss first, the objective's metrics, then lm_loss_ppl, and per character where it is known how many tokens stand for one.

    >>> with_perplexity({"lm_loss": 0.0, "tokens_per_char": 0.5})
    {'lm_loss': 0.0, 'lm_loss_ppl': 1.0, 'lm_loss_char_lvl_ppl': 1.0}
    """
    named = {name: value for name, value in metrics.items() if name != PER_CHARACTER}
    if "lm_loss" not in named:
        return named
    found = {"lm_loss": named["lm_loss"], **named, "lm_loss_ppl": perplexity(named["lm_loss"])}
    if PER_CHARACTER in metrics:
        found["lm_loss_char_lvl_ppl"] = perplexity(named["lm_loss"] * metrics[PER_CHARACTER])
    return found


def _show(chart: str, prefix: str, metrics: Mapping[str, float] | None) -> None:
    if metrics is None:
        log.info("the %s pass at %s was broken off", chart, prefix)
        return
    for line in format_evaluation(EvaluationBlock(chart, prefix, metrics)).split("\n"):
        log.info(line)


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
