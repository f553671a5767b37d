# SPDX-License-Identifier: Apache-2.0
"""Which characters are trained, on templates small enough to see why."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.data.chat.template import ChatTemplate
from megatron.data.chat.turns import Conversation, UnmaskableError, mark
from tests.support.chat import turns

CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}


def trained(source: str, talk: list[Any], **how: Any) -> list[str]:
    text, spans, _ = mark(ChatTemplate({"default": source}, {}), Conversation(talk), "assistant", **how)
    return [text[start:end] for start, end in spans]


def loop(body: str, *, before: str = "", prompt: str = "") -> str:
    return before + "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"


def test_what_the_template_writes_for_the_model_is_trained_after_its_own_prompt() -> None:
    """A template for thinking models that writes an empty thought: the model must learn to write it."""
    body = "<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}</>"
    assert trained(loop(body, prompt="<assistant>"), turns("a", "b")) == ["<think></think>b</>"]
    # Without a prompt of the template's own nobody can tell the thought from the header.
    assert trained(loop(body), turns("a", "b")) == ["b</>"]
    # A prompt that the turn does not begin with says nothing.
    assert trained(loop(body, prompt="<assistant><think>\n"), turns("a", "b")) == ["b</>"]


def test_a_call_whose_header_is_shorter() -> None:
    answer = "{% elif m.tool_calls %}[CALL]{{ m.tool_calls[0].name }};{% else %}Bot: {{ m.content }};{% endif %}"
    body = "{% if m.role == 'user' %}[{{ m.content }}]" + answer
    assert trained(loop(body), [*turns("a"), CALL]) == ["[CALL]f;"]
    assert trained(loop(body), turns("a", "b")) == ["b;"]


def test_refused_beginnings_are_passed_over() -> None:
    before = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
    assert trained(loop("<{{ m.role }}>{{ m.content }}", before=before), turns("a", "b", "c", "d", system="s")) == ["b", "d"]
    # The text before a turn must be certain even where it cannot be rendered alone.
    before = "{% if messages | length == 3 %}{{ raise_exception('odd') }}{% endif %}{% if messages[-1].content == 'd' %}!{% endif %}"
    with pytest.raises(UnmaskableError, match="depends on that turn's content"):
        trained(loop("<{{ m.role }}>{{ m.content }}", before=before), turns("a", "b", "c", "d"), first=3)
    # Here the first assistant turn's end is never seen.
    before = "{% if messages | length == 2 %}{{ raise_exception('not two') }}{% endif %}"
    with pytest.raises(UnmaskableError, match=r"refuses the conversation up to turn 1 \(assistant\)"):
        trained(loop("<{{ m.role }}>{{ m.content }}", before=before), turns("a", "b", "c", "d"))


def test_other_turns_may_depend_on_what_follows() -> None:
    """Two tool outputs in one bracket: after the first alone the text would end the bracket, but no border is needed there."""
    opening = "{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}({% endif %}{{ m.content }}"
    closing = "{% if loop.last or loop.nextitem.role != 'tool' %}){% endif %}"
    source = loop(opening + closing + "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}")
    outputs = [{"role": "tool", "content": content} for content in "xy"]
    assert trained(source, [*turns("a", "b"), *outputs, {"role": "assistant", "content": "c"}]) == ["b", "c"]
    with pytest.raises(UnmaskableError, match=r"with 3 of 4 turns, the last being turn 2 \(tool\)"):
        mark(ChatTemplate({"default": source}, {}), Conversation([*turns("a", "b"), *outputs]), "tool")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("{{ m.content }}{% if loop.last %}$$${% endif %}", r"with 1 of 2 turns, the last being turn 0 \(user\)"),
        ("<{{ m.role }}>", r"turn 1 \(assistant\): the template does not write its content"),
        ("{{ messages[-1].content }}", "not prefix-stable"),
        ("{{ messages | length }}{{ m.content }}", "not prefix-stable"),
    ],
)
def test_what_cannot_be_masked(body: str, what: str) -> None:
    with pytest.raises(UnmaskableError, match=what):
        trained(loop(body), turns("a", "b"))


def test_marked_blocks_win_over_everything() -> None:
    """Even over an unstable template; the wanted turns are told by their number."""
    talk = turns("a", "b", "c", "d")
    answer = "{% generation %}{{ m.content }}!{% endgeneration %}"
    source = loop("{{ loop.length }}{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}{% endif %}")
    assert trained(source, talk) == ["b!", "d!"]
    assert trained(source, talk, only_last=True) == trained(source, talk, first=2) == ["d!"]
    # Two blocks in a turn: turns are told by their ends.
    answer = "{% generation %}{{ m.content }}{% endgeneration %}-{% generation %}!{% endgeneration %}"
    twice = loop("{{ m.role }}{% if m.role == 'assistant' %}" + answer + "{% endif %}")
    assert trained(twice, talk, only_last=True) == ["d", "!"]


def test_contents_made_of_parts() -> None:
    source = loop("<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}|")
    assert trained(source, [*turns("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]) == ["b|"]
