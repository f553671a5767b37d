# SPDX-License-Identifier: Apache-2.0
"""From marked text to ids and labels.

A label is the token's own id where it is trained, else UNTRAINED; labels are not shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.data.chat.template import ChatTemplate, RenderError, Span
from megatron.data.chat.turns import Conversation, UnmaskableError, check_prefix, mark, rendered, wanted_turns
from megatron.data.preprocess.encoders import UNTRAINED
from megatron.tokenizer.hugging_face import Spans, SpanTokenizer

NEOX_FIX = "--turn-borders exact masks it"


class Borders(str, Enum):
    """How a conversation is cut into tokens.

    EXACT: the whole text is encoded once, so every character is kept; a token is trained if all of it is
    NEOX:  as the reference cuts: turn i has the tokens of the first i turns beyond as many as there are already. The same, unless
           a token lies across the border of two turns: then characters there are lost or doubled
    """

    EXACT = "exact"
    NEOX = "neox"


@dataclass(frozen=True)
class Masking:
    """What is trained.

    role:      its turns are trained
    only_last: only the last turn of the conversation
    labels:    False = no labels at all
    reward:    the layout for reward models: one label, on a second end-of-document token
    keep_untrained: keep conversations without any label, as the reference does
    """

    role: str = "assistant"
    only_last: bool = False
    labels: bool = True
    reward: bool = False
    borders: Borders = Borders.EXACT
    keep_untrained: bool = False


class EncodingPlan(NamedTuple):
    """What is to be encoded for one conversation, and how to read it.

    texts:   one, or (NEOX) the text after each turn
    spans:   trained characters of the one text
    blocks:  the template told them
    trained: turns to train (NEOX)
    """

    texts: tuple[str, ...]
    spans: tuple[Span, ...] = ()
    trained: tuple[int, ...] | None = None
    blocks: bool = False


class Masked(NamedTuple):
    """ids [n] int32; labels [n] int32.

    crossing: a token lies across the border of something trained
    endless:  the template's blocks leave out the special token behind them, so the model would not learn to end its turn
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    crossing: bool
    endless: bool = False


def plan(template: ChatTemplate, talk: Conversation, masking: Masking, *, first: int = 0) -> EncodingPlan:
    """Render what the masking needs; turns before `first` are not trained. Raises UnmaskableError."""
    if masking.borders is Borders.NEOX and not masking.reward:
        wanted = wanted_turns(talk.turns, masking.role, only_last=masking.only_last, first=first)
        return EncodingPlan(_neox_texts(template, talk, masking.role), trained=tuple(wanted))
    if masking.reward or not masking.labels:
        return EncodingPlan((rendered(template, talk).text,))
    marked = mark(template, talk, masking.role, only_last=masking.only_last, first=first)
    return EncodingPlan((marked.text,), marked.spans, blocks=marked.blocks)


def _neox_texts(template: ChatTemplate, talk: Conversation, role: str) -> tuple[str, ...]:
    whole = rendered(template, talk).text
    texts = []
    for count in range(1, len(talk.turns)):
        prompting = talk.turns[count]["role"] == role
        try:
            part = template.render(talk.turns[:count], talk.tools, add_generation_prompt=prompting).text
        except RenderError as error:
            raise UnmaskableError(f"the template refuses the first {count} turns alone: {error}; {NEOX_FIX}") from error
        try:
            check_prefix(part, whole, talk, count)
        except UnmaskableError as error:
            raise UnmaskableError(f"{error}; if only the generation prompt differs, {NEOX_FIX}") from error
        texts.append(part)
    # The text of the whole conversation last: turns are cut from it, too.
    return (*texts, whole)


def masked(tokenizer: SpanTokenizer, plans: Sequence[EncodingPlan]) -> list[Masked]:
    """Ids and labels of every plan, without the end-of-document token. All plans are of one kind."""
    texts = [text for made in plans for text in made.texts]
    if any(made.trained is not None for made in plans):
        ids = iter(tokenizer.encode_ids(texts))
        return [_neox([next(ids) for _ in made.texts], made.trained or ()) for made in plans]
    return [_exact(tokenizer, tokens, made) for tokens, made in zip(tokenizer.encode_batch(texts), plans, strict=True)]


def _exact(tokenizer: SpanTokenizer, tokens: Spans, made: EncodingPlan) -> Masked:
    found = labelled(tokens, made.spans)
    if not made.blocks:
        return found
    behind = np.searchsorted(tokens.starts, [end for _, end in made.spans])
    untrained = found.labels == UNTRAINED
    endless = any(place < len(untrained) and untrained[place] and int(tokens.ids[place]) in tokenizer.special for place in behind)
    return found._replace(endless=endless)


def labelled(tokens: Spans, spans: Sequence[Span]) -> Masked:
    """The tokens that lie in a span with all their characters are trained; those across a span's border are not."""
    inside, across = np.zeros((2, len(tokens.ids)), dtype=bool)
    for start, end in spans:
        inside |= (tokens.starts >= start) & (tokens.ends <= end) & (tokens.ends > tokens.starts)
        for border in (start, end):
            across |= (tokens.starts < border) & (border < tokens.ends)
    return Masked(tokens.ids, np.where(inside, tokens.ids, UNTRAINED).astype(np.int32), bool(across.any()))


def _neox(encoded: Sequence[NDArray[np.int32]], trained: Sequence[int]) -> Masked:
    pieces, labels = [], []
    count = 0
    for number, so_far in enumerate(encoded):
        piece = so_far[count:]
        count += len(piece)
        pieces.append(piece)
        labels.append(piece if number in trained else np.full(len(piece), UNTRAINED, dtype=np.int32))
    ids = np.concatenate(pieces)
    return Masked(ids, np.concatenate(labels), not np.array_equal(ids, encoded[-1]))


def count_trained(found: Masked) -> int:
    """Tokens with a label."""
    return int((found.labels != UNTRAINED).sum())


def close(found: Masked, tokenizer: SpanTokenizer, *, reward: bool) -> Masked:
    """End with the end-of-document token, unless the template has written it already (white space may follow it).

    It is trained if the token before it is. With `reward` nothing is trained but one more such token.
    """
    eod = tokenizer.eod
    ids, labels = found.ids.tolist(), found.labels.tolist()
    if reward:
        labels = [UNTRAINED] * len(ids)
    if not ends_with_eod(ids, tokenizer):
        trained = bool(labels) and labels[-1] != UNTRAINED
        ids.append(eod)
        labels.append(eod if trained else UNTRAINED)
    if reward:
        ids.append(eod)
        labels.append(eod)
    return Masked(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), found.crossing, found.endless)


def ends_with_eod(ids: Sequence[int], tokenizer: SpanTokenizer) -> bool:
    """Whether the last id that is not white space ends a document."""
    for number in reversed(ids):
        if number == tokenizer.eod:
            return True
        if not tokenizer.is_space(number):
            return False
    return False
