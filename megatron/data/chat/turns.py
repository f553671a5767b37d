# SPDX-License-Identifier: Apache-2.0
"""Which characters of a rendered conversation are trained.

Where the template marks them with `{% generation %}`, those. Else every turn of the generation role from the end of its header
to the end of its rendering, end-of-turn included. A turn's rendering is what it adds to the rendering of the turns before it;
that is only true if the text of the turns up to either end is the beginning of the whole text, so this is checked every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from megatron.data.chat.template import ChatTemplate, RenderError, Rendering, Span, Turn
from megatron.tokenizer.tokenizer import encodable

UNSTABLE = "the template is not prefix-stable"
FIX = "put {% generation %} blocks into the template, or use one that renders a turn the same way whatever follows it"
# What a turn holds beside its content and is generated with it: left out when the turn's header is looked for.
GENERATED_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
# Two contents without a common beginning.
PROBES = ("Yes", "No")


class UnmaskableError(ValueError):
    """This conversation cannot be turned into ids and labels; the message says which turn and why."""


class Conversation(NamedTuple):
    """Turns {role, content, ...} and the tools offered."""

    turns: Sequence[Turn]
    tools: Sequence[Any] | None = None


class Marked(NamedTuple):
    """A rendered conversation; spans are the trained characters, in order, not touching each other. blocks: the template told them."""

    text: str
    spans: tuple[Span, ...]
    blocks: bool = False


def rendered(template: ChatTemplate, talk: Conversation) -> Rendering:
    """The whole conversation. Raises UnmaskableError."""
    try:
        whole = template.render(talk.turns, talk.tools)
    except RenderError as error:
        raise UnmaskableError(f"the template does not take this conversation: {error}") from error
    if not encodable(whole.text):
        raise UnmaskableError("the text holds half of a surrogate pair, which is no character")
    return whole


def mark(template: ChatTemplate, talk: Conversation, role: str, *, only_last: bool = False, first: int = 0) -> Marked:
    """The text and its trained characters; turns before `first` are not trained. Raises UnmaskableError."""
    text, generated = rendered(template, talk)
    wanted = wanted_turns(talk.turns, role, only_last=only_last, first=first)
    if generated and role == "assistant":
        return Marked(text, _within(generated, template, talk, wanted, text), blocks=True)
    ends = turn_ends(template, talk, text, wanted)
    return Marked(text, merged(_turn_span(template, talk, number, text, ends) for number in wanted))


def wanted_turns(turns: Sequence[Turn], role: str, *, only_last: bool, first: int = 0) -> list[int]:
    """Numbers of the turns to train, from `first` on; with `only_last` the last turn of the conversation, if it has the role."""
    start = len(turns) - 1 if only_last else first
    return [number for number in range(start, len(turns)) if turns[number]["role"] == role]


def turn_ends(template: ChatTemplate, talk: Conversation, text: str, wanted: Sequence[int]) -> dict[int, int]:
    """Where the first n turns end in the text, for each n at either end of a wanted turn. Missing where the template refuses the
    conversation up to there (a system turn alone, say). Other turns need no borders, so they may depend on what follows."""
    ends = {0: 0, len(talk.turns): len(text)}
    for count in sorted({end for number in wanted for end in (number, number + 1)} - ends.keys()):
        try:
            part = template.render(talk.turns[:count], talk.tools).text
        except RenderError:
            continue
        check_prefix(part, text, talk, count)
        if len(part) < max(end for before, end in ends.items() if before < count):
            raise UnmaskableError(f"{UNSTABLE}: turn {count - 1} ({talk.turns[count - 1]['role']}) makes the text shorter; {FIX}")
        ends[count] = len(part)
    return ends


def check_prefix(part: str, text: str, talk: Conversation, count: int) -> None:
    """Raise UnmaskableError unless `part`, the first `count` turns, begins the whole text."""
    if text.startswith(part):
        return
    at = agreement(part, text)
    raise UnmaskableError(
        f"{UNSTABLE}: with {count} of {len(talk.turns)} turns, the last being turn {count - 1} ({talk.turns[count - 1]['role']}), "
        f"it writes {part[at : at + 30]!r} where the whole conversation has {text[at : at + 30]!r} (character {at}); {FIX}"
    )


def agreement(one: str, other: str) -> int:
    """How many characters two texts begin with alike. Slices are compared, as comparing characters in Python takes long.

    >>> agreement("abcd", "abxd"), agreement("ab", "abc"), agreement("", "a")
    (2, 2, 0)
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order without the empty ones; those that touch become one.

    >>> merged([(0, 3), (3, 3), (3, 5), (7, 9)])
    ((0, 5), (7, 9))
    """
    kept: list[Span] = []
    for start, end in spans:
        if kept and kept[-1][1] >= start:
            kept[-1] = (kept[-1][0], max(end, kept[-1][1]))
        elif end > start:
            kept.append((start, end))
    return tuple(kept)


def _turn_span(template: ChatTemplate, talk: Conversation, number: int, text: str, ends: Mapping[int, int]) -> Span:
    if number + 1 not in ends:
        role = talk.turns[number]["role"]
        raise UnmaskableError(f"the template refuses the conversation up to turn {number} ({role}), so its end is not known; {FIX}")
    return _header_end(template, talk, number, text, ends.get(number)), ends[number + 1]


def _header_end(template: ChatTemplate, talk: Conversation, number: int, text: str, begin: int | None) -> int:
    """Where what is generated begins: as far as renderings with other contents agree with the text, but no later than the
    template's own generation prompt reaches, where the turn does begin with it. The prompt alone would not do: some templates
    have none, and some add a `<think>` that the turn does not have."""
    before, turn = talk.turns[:number], talk.turns[number]
    bare = {key: value for key, value in turn.items() if key not in GENERATED_KEYS}
    try:
        probes = [template.render([*before, {**bare, "content": _like(turn.get("content"), probe)}], talk.tools).text for probe in PROBES]
    except RenderError as error:
        raise UnmaskableError(
            f"turn {number} ({turn['role']}): the template refuses another content, so its header is not known: {error}"
        ) from error
    if probes[0] == probes[1]:
        raise UnmaskableError(f"turn {number} ({turn['role']}): the template does not write its content; {FIX}")
    common = agreement(*probes)
    agreed = min(common, agreement(probes[0], text))
    # Where the turn begins is not known if the template refuses the turns before it alone; then the probes must say it all.
    least, begin = (common, 0) if begin is None else (begin, begin)
    if agreed < least:
        raise UnmaskableError(f"{UNSTABLE}: the text before turn {number} ({turn['role']}) depends on that turn's content; {FIX}")
    if not text[begin:agreed].strip():
        return begin  # white space alone is no header ("[/INST] Yes"): the model writes it, mostly within its first token
    try:
        prompt = template.render(before, talk.tools, add_generation_prompt=True).text
    except RenderError:
        return agreed
    return min(agreed, len(prompt)) if len(prompt) > begin and text.startswith(prompt) else agreed


def _like(content: Any, text: str) -> Any:
    return [{"type": "text", "text": text}] if isinstance(content, list) else text


def _within(generated: Sequence[Span], template: ChatTemplate, talk: Conversation, wanted: Sequence[int], text: str) -> tuple[Span, ...]:
    """The generation spans of the wanted turns. In most templates every turn has one block; else turns are told by their ends."""
    everyone = [number for number, turn in enumerate(talk.turns) if turn["role"] == "assistant"]
    if wanted == everyone:
        return merged(generated)
    if len(generated) == len(everyone):
        return merged(span for number, span in zip(everyone, generated, strict=True) if number in wanted)
    ends = turn_ends(template, talk, text, wanted)
    kept: list[Span] = []
    for number in wanted:
        if number not in ends or number + 1 not in ends:
            raise UnmaskableError(f"the template refuses a part of the conversation, so where turn {number} (assistant) lies is not known")
        kept += [span for span in generated if ends[number] <= span[0] and span[1] <= ends[number + 1]]
    return merged(kept)
