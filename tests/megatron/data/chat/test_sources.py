# SPDX-License-Identifier: Apache-2.0
"""Conversations -> ids, labels and rewards: against recordings of the reference, and against what each template must train."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.chat.masks import Borders, Masking
from megatron.data.chat.sources import CROSSING, CUT, ENDLESS, NOTHING, ChatEncoder, ChatSource, chat_format
from megatron.data.preprocess.encoders import UNTRAINED, EncodedRecords
from tests.support.chat import GOLDEN, STYLES, chat_folder, turns

STABLE = [name for name in STYLES if name != "qwen3"]
RECORDED = json.loads((GOLDEN / "chat" / "recordings.json").read_text())


@cache
def encoder(name: str, **how: Any) -> ChatEncoder:
    with TemporaryDirectory() as folder:
        return ChatSource(chat_format(str(chat_folder(Path(folder), name))), keys=("talk",), masking=Masking(**how)).open()


def encoded(batch: EncodedRecords) -> Iterator[dict[str, np.ndarray]]:
    """Stream -> values of each document."""
    for number in range(batch.documents):
        one = {}
        for name, stream in batch.streams.items():
            end = int(stream.sizes[: number + 1].sum())
            one[name] = stream.values[end - stream.sizes[number] : end]
        yield one


def single(name: str, talk: list[Any], **how: Any) -> dict[str, np.ndarray]:
    batch = encoder(name, **how)([{"talk": talk}])
    assert not batch.faults, batch.faults
    return next(encoded(batch))


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / "chat" / f"{name}.jsonl").read_text().splitlines()]


def golden_encoder(case: str, borders: Borders = Borders.NEOX) -> ChatEncoder:
    masking = Masking(only_last=case == "chat_only_last", reward=case.endswith("for_rm"), borders=borders, keep_untrained=True)
    keys = ("chosen", "rejected") if case.startswith("pairs") else ("conversation",)
    reward = "reward" if case == "chat_reward" else None
    return ChatSource(chat_format(str(GOLDEN / "tokenizer")), keys, masking, reward_key=reward).open()


@pytest.mark.parametrize("case", sorted(RECORDED))
def test_recordings_of_the_reference(case: str) -> None:
    batch = golden_encoder(case)(records(case.split("_")[0]))
    assert not batch.faults and not batch.dropped
    for name, stream in batch.streams.items():
        if name.endswith("reward"):  # the reference's fractions become 0
            assert np.unique(stream.values).tolist() == pytest.approx(sorted({record["reward"] for record in records("chat")}))
            assert stream.values.dtype == np.float32 and encoder_stream(case, name).integral == np.int32
            continue
        assert stream.values.dtype == np.int32
        assert hashlib.sha256(stream.values.tobytes()).hexdigest() == RECORDED[case][f"ds_{name}_document.bin"]


def encoder_stream(case: str, name: str) -> Any:
    return golden_encoder(case).streams[name]


def test_characters_the_reference_loses_are_kept_by_exact_borders() -> None:
    talk = records("chat")[3:4]
    neox, exact = golden_encoder("chat_default"), golden_encoder("chat_default", Borders.EXACT)
    text = exact.template.render(talk[0]["conversation"]).text + "<|endoftext|>"
    lost, kept = (next(encoded(one(talk)))["conversation"] for one in (neox, exact))
    assert exact.tokenizer.decode(kept) == text
    damaged = exact.tokenizer.decode(lost)
    assert "<|assistant|>\n   while_stm" in text and "<|assistant|>\n   while_stm" not in damaged
    assert len(damaged) == len(text) - 4
    assert neox(records("chat")).notes == {CUT: 39} and exact(records("chat")).notes == {CROSSING: 39}


def test_both_borders_agree_where_no_token_crosses() -> None:
    every = records("chat")
    neox, exact = golden_encoder("chat_default"), golden_encoder("chat_default", Borders.EXACT)
    same = 0
    for record in every:
        a, b = neox([record]), exact([record])
        if not a.notes:
            same += 1
            left, right = next(encoded(a)), next(encoded(b))
            assert left["conversation"].tolist() == right["conversation"].tolist()
            # Turns of this template differ in one thing: the header is the previous turn's, the last newline the turn's own.
            assert left["conversation_label"].tolist() == right["conversation_label"].tolist()
    assert same == 21


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Z", "Cc"), exclude_characters="<>|"), min_size=1, max_size=4)
CONTENT = st.lists(WORD, min_size=1, max_size=5).map(" ".join)


@pytest.mark.parametrize("name", STABLE)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_trained_is_what_the_assistant_writes(name: str, data: st.DataObject) -> None:
    style = STYLES[name]
    rounds = data.draw(st.integers(1, 3))
    contents = [data.draw(CONTENT) for _ in range(2 * rounds)]
    if name == "deepseek":
        contents[1] = "<think>hm</think>" + contents[1]
    talk = turns(*contents, system=data.draw(st.none() | CONTENT) if style.system else None)
    one = single(name, talk)
    tokenizer = encoder(name).tokenizer
    ids, labels = one["talk"], one["talk_label"]
    wanted = [style.trained(content) for content in contents[1::2]]
    trained = ids[labels != UNTRAINED]
    assert labels[labels != UNTRAINED].tolist() == trained.tolist()
    assert tokenizer.decode(trained) == "".join(wanted) + style.tail
    # Nothing trained lies across a border here, so the counts add up, too.
    assert len(trained) == sum(len(tokenizer.encode(text).ids) for text in [*wanted, style.tail])
    assert tokenizer.decode(ids) == encoder(name).template.render(talk).text + style.tail
    ending = [number for number in ids.tolist() if not tokenizer.is_space(number)][-2:]
    assert ending[-1] == tokenizer.eod != ending[-2]


@settings(max_examples=20, deadline=None)
@given(contents=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=2, max_size=4))
def test_every_character_is_kept_and_only_crossing_tokens_are_not_trained(contents: list[str]) -> None:
    batch = encoder("olmo", keep_untrained=True)([{"talk": turns(*contents)}])
    one = next(encoded(batch))
    tokenizer = encoder("olmo").tokenizer
    whole = tokenizer.decode(one["talk"])
    assert whole == encoder("olmo").template.render(turns(*contents)).text + ("" if len(contents) % 2 == 0 else "<|endoftext|>")
    if not batch.notes:
        trained = one["talk"][one["talk_label"] != UNTRAINED]
        assert tokenizer.decode(trained) == "".join(STYLES["olmo"].trained(content) for content in contents[1::2])


def test_unstable_template_is_a_fault_that_names_the_turn() -> None:
    talk = turns("Hi", "<think>hm</think>\nYes", "And?", "<think>so</think>\nNo")
    batch = encoder("qwen3")([{"talk": turns("Hi", "Yes")}, {"talk": talk}])
    assert batch.documents == 1
    [(number, what)] = batch.faults
    assert number == 1 and "not prefix-stable" in what and "turn 1 (assistant)" in what and "{% generation %}" in what
    assert "not prefix-stable" in encoder("qwen3", borders=Borders.NEOX)([{"talk": talk}]).faults[0][1]


def test_generation_prompt_that_the_turn_lacks() -> None:
    talk = {"talk": turns("Hi", "<think>hm</think>Yes")}
    assert encoder("deepseek")([talk]).trained == len(encoder("deepseek").tokenizer.encode("Yes<end>").ids)
    assert "--turn-borders exact" in encoder("deepseek", borders=Borders.NEOX)([talk]).faults[0][1]


def test_tool_calls_are_trained_and_tool_outputs_not() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    talk = [*turns("Hi"), call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "done"}]
    written = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
    for name, gap in (("marked", ""), ("tools", "\n")):
        one = single(name, talk)
        trained = one["talk"][one["talk_label"] != UNTRAINED]
        assert encoder(name).tokenizer.decode(trained) == f"{written}{gap}done<|im_end|>{gap}"


def test_flags() -> None:
    talk = turns("a", "b", "c", "d")
    tokenizer = encoder("chatml").tokenizer

    def trained(**how: Any) -> str:
        one = single("chatml", talk, **how)
        return tokenizer.decode(one["talk"][one["talk_label"] != UNTRAINED])

    assert trained(only_last=True) == "d<|im_end|>\n"
    assert trained(role="user") == "a<|im_end|>\nc<|im_end|>\n"
    assert single("marked", talk, only_last=True)["talk_label"].max() >= 0
    assert set(single("chatml", talk, labels=False)) == {"talk"}
    model = single("chatml", talk, reward=True)
    assert model["talk_label"][:-1].tolist() == [UNTRAINED] * (len(model["talk"]) - 1) and model["talk_label"][-1] == tokenizer.eod
    assert tokenizer.decode(model["talk"]).endswith("d<|im_end|>\n<|im_end|>")
    assert encoder("chatml")([{"talk": turns("a")}]).dropped == {NOTHING: 1}
    assert encoder("chatml", only_last=True)([{"talk": turns("a", "b", "c")}]).dropped == {NOTHING: 1}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({}, "no key talk"),
        ({"talk": []}, "not a list"),
        ({"talk": "text"}, "not a list"),
        ({"talk": [{"from": "human", "value": "x"}]}, "rename from/value"),
        ({"talk": [{"role": "user"}]}, "no content"),
        ({"talk": [{"role": "user", "content": None}]}, "does not take"),
        ({"talk": [{"role": "user", "content": "\ud83d"}]}, "surrogate"),
    ],
)
def test_unusable_records(record: dict[str, Any], what: str) -> None:
    assert what in encoder("chatml")([record]).faults[0][1]


def test_rewards(tmp_path: Path) -> None:
    form = chat_format(str(chat_folder(tmp_path, "chatml")))
    values = [True, False, 0.7, 0, -1, None, "x", float("nan")]
    rows = [{"talk": turns("a", "b"), "r": value} for value in values]
    plain = ChatSource(form, ("talk",), reward_key="r").open()(rows)
    assert plain.streams["talk_reward"].values.tolist() == pytest.approx([1, 0, 0.7, 0, -1]) and len(plain.faults) == 3
    assert plain.streams["talk_reward"].sizes.tolist() == [1] * 5
    signs = ChatSource(form, ("talk",), reward_key="r", binary=True).open()(rows)
    assert signs.streams["talk_reward"].values.tolist() == [1, -1, 1, -1, -1]
    assert signs.streams["talk_reward"].values.dtype == np.int32


def test_ftfy_fixes_contents(tmp_path: Path) -> None:
    source = ChatSource(chat_format(str(chat_folder(tmp_path, "chatml"))), ("talk",), ftfy=True)
    ids = source.open()([{"talk": turns("a", "\u00e2\u0153\u201d No problems")}]).streams["talk"].values
    assert "\u2714 No problems" in source.open().tokenizer.decode(ids)


def test_blocks_that_leave_out_the_end_of_turn_are_told(tmp_path: Path) -> None:
    block = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}|{% if m.role == 'assistant' %}" + block + "{% endif %}<|im_end|>{% endfor %}"
    )
    form = chat_format(str(chat_folder(tmp_path, "chatml", chat_template=template)))
    assert ChatSource(form, ("talk",)).open()([{"talk": turns("a", "b")}]).notes == {ENDLESS: 1}
    assert not encoder("marked")([{"talk": turns("a", "b")}]).notes
