# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: records -> ids and labels of the chosen and the rejected answer, and their lengths.

Both answers have the same prompt ids: the text is cut where the answers begin unless a token boundary lies there anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from megatron.data.chat.masks import close, count_trained, labelled
from megatron.data.chat.records import answered, common_turns, fixed
from megatron.data.chat.sources import IDS, NOTHING, ChatEncoder, ChatFormat
from megatron.data.chat.turns import Marked, UnmaskableError, mark
from megatron.data.preprocess.encoders import LENGTHS, UNTRAINED, Dropped, EncodedRecords, Fault, Outcome, StreamFormat, gather, text_fixer
from megatron.tokenizer.hugging_face import Spans, SpanTokenizer

SAME = "chosen equals rejected"
PROMPTS_DIFFER = "the prompts differ"
SHOWN_TOKENS = 300


@dataclass(frozen=True)
class PairSource:
    """Pairs -> streams `<chosen>`, `<chosen>_label`, `<rejected>`, `<rejected>_label`, and `lengths`: 3 values per pair, the tokens
    of the prompt, of the chosen answer and of the rejected answer. What both conversations begin with is the prompt."""

    form: ChatFormat
    prompt_key: str = "prompt"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    role: str = "assistant"
    tools_key: str | None = None
    ftfy: bool = False

    def open(self) -> PairEncoder:
        """Open tokenizer and template."""
        return PairEncoder(self)


class TextPair(NamedTuple):
    """Both texts; they are equal before `cut`."""

    chosen: Marked
    rejected: Marked
    cut: int


class PairEncoder:
    """See PairSource. Pairs that teach nothing are dropped: equal answers, an answer without anything to train, differing prompts."""

    def __init__(self, source: PairSource) -> None:
        self.source = source
        self.tokenizer = source.form.open_tokenizer()
        self.template = source.form.open_template()
        self.fix = text_fixer() if source.ftfy else None
        self.keys = (source.chosen_key, source.rejected_key)
        self.streams: dict[str, StreamFormat] = {name: IDS for key in self.keys for name in (key, f"{key}_label")}
        self.streams[LENGTHS] = IDS

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> EncodedRecords:
        """Ids, labels and lengths of each pair."""
        pairs = [self._pair(record) for record in records]
        whole = iter(self.tokenizer.encode_batch([side.text for pair in pairs if isinstance(pair, TextPair) for side in pair[:2]]))
        outcomes = [self._outcome(pair, (next(whole), next(whole))) if isinstance(pair, TextPair) else pair for pair in pairs]
        labels = [outcome[f"{key}_label"] for outcome in outcomes if isinstance(outcome, Mapping) for key in self.keys]
        return gather(outcomes, self.streams, trained=sum(int((label != UNTRAINED).sum()) for label in labels))

    def _pair(self, record: Mapping[str, Any]) -> TextPair | Dropped | Fault:
        source = self.source
        try:
            talks = [answered(record, source.prompt_key, key, source.role, source.tools_key)[0] for key in self.keys]
            chosen, rejected = (fixed(talk, self.fix) if self.fix else talk for talk in talks)
            first = common_turns(chosen.turns, rejected.turns)
            if first == len(chosen.turns) == len(rejected.turns):
                return Dropped(SAME)
            if first in (len(chosen.turns), len(rejected.turns)):
                return Dropped(NOTHING)
            sides = [mark(self.template, talk, source.role, first=first) for talk in (chosen, rejected)]
        except UnmaskableError as error:
            return Fault(str(error))
        if not all(side.spans for side in sides):
            return Dropped(NOTHING)
        cut = min(side.spans[0][0] for side in sides)
        return TextPair(sides[0], sides[1], cut) if sides[0].text[:cut] == sides[1].text[:cut] else Dropped(PROMPTS_DIFFER)

    def _outcome(self, pair: TextPair, whole: tuple[Spans, Spans]) -> Outcome:
        starts = [_boundary(spans, pair.cut) for spans in whole]
        prompt = starts[0]
        if prompt is None or prompt != starts[1] or not np.array_equal(whole[0].ids[:prompt], whole[1].ids[:prompt]):
            before = self.tokenizer.encode(pair.chosen.text[: pair.cut])
            prompt = len(before.ids)
            whole = (self._joined(before, pair.chosen, pair.cut), self._joined(before, pair.rejected, pair.cut))
        found = [close(labelled(spans, side.spans), self.tokenizer, reward=False) for spans, side in zip(whole, pair[:2], strict=True)]
        if np.array_equal(found[0].ids, found[1].ids):
            return Dropped(SAME)
        if not all(count_trained(side) for side in found):
            return Dropped(NOTHING)
        values: dict[str, Any] = {LENGTHS: np.array([prompt, *(len(side.ids) - prompt for side in found)], dtype=np.int32)}
        for key, side in zip(self.keys, found, strict=True):
            values |= {key: side.ids, f"{key}_label": side.labels}
        return values

    def _joined(self, before: Spans, side: Marked, cut: int) -> Spans:
        after = self.tokenizer.encode(side.text[cut:])
        pairs: Any = zip(before, (after.ids, after.starts + cut, after.ends + cut), strict=True)
        return Spans(*map(np.concatenate, pairs))


def _boundary(spans: Spans, cut: int) -> int | None:
    """How many tokens lie before the character `cut`; None where one lies across it."""
    count = int((spans.starts < cut).sum())
    return count if (spans.ends[:count] <= cut).all() else None


def preview(encoder: ChatEncoder | PairEncoder, records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Stream -> the text of the first record that gives documents, with [[ ]] around what is trained; empty if none does."""
    for record in records:
        streams = encoder([record]).streams
        if any(len(stream.sizes) for stream in streams.values()):
            names = [name for name in streams if not name.endswith(("_label", "_reward")) and name != LENGTHS]
            return {
                name: shown(encoder.tokenizer, streams[name].values, streams[f"{name}_label"].values if f"{name}_label" in streams else ())
                for name in names
            }
    return {}


def shown(tokenizer: SpanTokenizer, ids: Iterable[int], labels: Iterable[int]) -> str:
    """The text of the first SHOWN_TOKENS ids, with [[ ]] around what is trained."""
    numbers, marks = list(map(int, ids)), [label != UNTRAINED for label in labels]
    marks = marks or [False] * len(numbers)
    runs = groupby(zip(numbers[:SHOWN_TOKENS], marks[:SHOWN_TOKENS], strict=True), key=lambda pair: pair[1])
    text = "".join(f"[[{part}]]" if trained else part for trained, run in runs for part in [tokenizer.decode([one for one, _ in run])])
    return text + (f" ... ({len(numbers) - SHOWN_TOKENS} more tokens)" if len(numbers) > SHOWN_TOKENS else "")
