# SPDX-License-Identifier: Apache-2.0
"""Records become what the encoders read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.data.chat.sources import chat_format
from megatron.data.hf.detect import Found, How
from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.preprocess.encoders import Dropped, Fault
from tests.support.chat import chat_folder, turns


def shaped(how: How, columns: dict[str, str] | list[tuple[str, str]], record: dict[str, Any]) -> Any:
    pairs = columns.items() if isinstance(columns, dict) else columns
    return RecordAdapter(Found(how, tuple(pairs))).open()(record)


def test_texts() -> None:
    assert shaped(How.TEXT, {"text": "body"}, {"body": "a", "id": 1}) == {"text": "a"}
    assert shaped(How.TEXT, {"text": "body"}, {"body": None}) == Dropped("empty")
    assert isinstance(shaped(How.TEXT, {"text": "body"}, {"other": "a"}), Fault)
    both = [("text", "prompt"), ("text", "response")]
    assert shaped(How.JOINED, both, {"prompt": "q", "response": "a"}) == {"text": "q\n\na"}
    assert shaped(How.JOINED, both, {"prompt": "", "response": {"n": 1}}) == {"text": '{"n": 1}'}
    assert shaped(How.JOINED, both, {"prompt": None, "response": ""}) == Dropped("empty")
    assert "response" in shaped(How.JOINED, both, {"prompt": "q"}).what


def test_contents_of_turns_without_roles() -> None:
    talk = [*turns("first", "", "third"), {"role": "assistant", "content": [{"type": "text"}]}, {"role": "assistant", "content": None}]
    text = shaped(How.CONTENTS, {"text": "messages"}, {"messages": talk})["text"]
    assert text == 'first\n\nthird\n\n[{"type": "text"}]'
    assert shaped(How.CONTENTS, {"text": "m"}, {"m": [{"from": "human", "value": "q"}]}) == {"text": "q"}
    assert shaped(How.CONTENTS, {"text": "m"}, {"m": []}) == Dropped("empty")
    assert isinstance(shaped(How.CONTENTS, {"text": "m"}, {"m": "text"}), Fault)


def test_turns_get_the_roles_that_templates_know() -> None:
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}], "tools": '[{"name": "f"}]'}
    found = shaped(How.TURNS, {"messages": "conversations", "tools": "tools"}, record)
    assert found == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}],
        "tools": [{"name": "f"}],
    }
    assert "'robot'" in shaped(How.TURNS, {"messages": "c"}, {"c": [{"from": "robot", "value": "q"}]}).what
    assert "not JSON" in shaped(How.TURNS, {"messages": "c", "tools": "tools"}, {"c": turns("q"), "tools": "{"}).what
    assert shaped(How.WRITTEN, {"text": "m"}, {"m": turns("q")}) == {"text": "[{'role': 'user', 'content': 'q'}]"}


def test_a_template_that_fails_is_a_fault_and_never_text(tmp_path: Path) -> None:
    form = chat_format(str(chat_folder(tmp_path, "gemma")))
    render = RecordAdapter(Found(How.RENDERED, (("messages", "m"),)), form).open()
    assert render({"m": turns("q", "a")}) == {"text": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"}
    for wrong in (turns("q", system="this template takes no system turn"), [{"role": "user"}], "text", None):
        assert isinstance(render({"m": wrong}), Fault), wrong
