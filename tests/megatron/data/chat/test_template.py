# SPDX-License-Identifier: Apache-2.0
"""Rendering equals transformers' on every kind of template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.data.chat.sources import chat_format
from megatron.data.chat.template import ChatTemplate, RenderError
from megatron.errors import DataError
from tests.support.chat import STYLES, chat_folder, turns

TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "Za\u017c\u00f3\u0142\u0107 <b> & 'x'", "parameters": {"type": "object"}}}
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "\u00e9"}}}]}


def test_renderings_equal_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    for name, style in STYLES.items():
        folder = chat_folder(tmp_path / name, name)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        form = chat_format(str(folder))
        ours, tokenizer = form.open_template(), form.open_tokenizer()
        talks: list[tuple[list[Any], Any]] = [(turns("Hi \n", " Hello\n there", "Wi{{ x }}e", "ok<|im_end|>"), None)]
        if style.system:
            talks.append((turns("Hi", "<think>\nhm</think>A", "\u00e9", "B", system="S "), None))
        if name in ("marked", "tools"):
            talks.append(([*turns("Hi"), CALL, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "done"}], TOOLS))
        for talk, tools in talks:
            for count in (len(talk), len(talk) - 1):
                for prompting in (False, True):
                    part = talk[:count]
                    text = ours.render(part, tools, add_generation_prompt=prompting).text
                    assert text == theirs.apply_chat_template(part, tools=tools, add_generation_prompt=prompting, tokenize=False), name
                    assert tokenizer.encode(text).ids.tolist() == theirs.apply_chat_template(
                        part, tools=tools, add_generation_prompt=prompting, return_dict=False
                    )
            if name == "marked":
                told = theirs.apply_chat_template(talk, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
                text, spans = ours.render(talk, tools)
                got = tokenizer.encode(text)
                mask = [int(any(s <= a and b <= e for s, e in spans)) for a, b in zip(got.starts, got.ends, strict=True)]
                assert mask == told["assistant_masks"] and 0 < sum(mask) < len(mask)


def test_where_templates_are_found(tmp_path: Path) -> None:
    one = [{"role": "user", "content": "x"}]
    folder = chat_folder(tmp_path, "chatml", chat_template=[{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
    template = chat_format(str(folder)).open_template()
    assert template.render(one).text == "D" and template.render(one, TOOLS).text == "T"
    (folder / "chat_template.jinja").write_text("J{{ bos_token }}")
    assert chat_format(str(folder)).open_template().render(one).text == "J<|endoftext|>"
    assert chat_format(str(folder / "tokenizer.json")).open_template().render(one).text == "J<|endoftext|>"
    (tmp_path / "mine.jinja").write_text("M")
    mine = chat_format(str(folder), str(tmp_path / "mine.jinja"))
    assert mine.open_template().render(one).text == "M"
    before = mine.digest
    (tmp_path / "mine.jinja").write_text("N")
    assert chat_format(str(folder), str(tmp_path / "mine.jinja")).digest != before


def test_special_tokens_of_either_file(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, "chatml", bos_token={"content": "<s>"}, chat_template="{{ bos_token }}{{ pad_token }}{{ sep_token }}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "pad_token": "<eos>"}))
    assert chat_format(str(folder)).open_template().render([]).text == "<s><eos>"


def test_faults_of_templates(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not valid Jinja"):
        ChatTemplate({"default": "{% for %}"}, {})
    with pytest.raises(DataError, match="no chat template"):
        chat_format(str(chat_folder(tmp_path, "chatml", chat_template=None)))
    refusing = ChatTemplate({"default": "{{ raise_exception('no ' + messages[0].role) }}"}, {})
    with pytest.raises(RenderError, match="no user"):
        refusing.render([{"role": "user"}])
    with pytest.raises(RenderError, match="TypeError"):
        ChatTemplate({"default": "{{ 'a' + messages[0].content }}"}, {}).render([{"role": "user", "content": None}])
    # A template comes with a downloaded model: it must neither reach Python nor change the record.
    for attack in ("{{ ''.__class__.__mro__ }}", "{% set _ = messages.append(1) %}"):
        with pytest.raises(RenderError, match="unsafe|not safely"):
            ChatTemplate({"default": attack}, {}).render([{"role": "user", "content": "x"}])


def test_a_dated_template_tells_one_day(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, "chatml", chat_template="{{ strftime_now('%Y') }}{% for m in messages %}{% break %}{% endfor %}")
    form = chat_format(str(folder))
    assert form.moment is not None and form.open_template().render([1]).text == form.moment[:4]
    assert chat_format(str(chat_folder(tmp_path / "b", "chatml"))).moment is None
