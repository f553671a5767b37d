# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: the same prompt ids on both sides, only the answers trained, and pairs that teach nothing dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.chat.masks import Masking
from megatron.data.chat.pairs import LENGTHS, PROMPTS_DIFFER, SAME, PairEncoder, PairSource
from megatron.data.chat.sources import NOTHING, ChatSource, chat_format
from megatron.data.preprocess.encoders import UNTRAINED
from tests.support.chat import STYLES, chat_folder, turns

NAMES = ["chatml", "llama3", "mistral", "olmo", "gemma", "deepseek", "marked", "qwen3"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PairEncoder]:
    return {name: PairSource(chat_format(str(chat_folder(tmp_path_factory.mktemp(name), name)))).open() for name in NAMES}


def one(encoder: PairEncoder, record: dict[str, Any]) -> dict[str, np.ndarray]:
    batch = encoder([record])
    assert batch.documents == 1, (batch.faults, batch.dropped)
    return {name: stream.values for name, stream in batch.streams.items()}


def check(encoder: PairEncoder, found: dict[str, np.ndarray], answers: tuple[str, str]) -> None:
    """The law of a pair: equal prompts without labels, and after them nothing trained but the answers."""
    prompt, *counts = found[LENGTHS].tolist()
    assert prompt > 0 and found["chosen"][:prompt].tolist() == found["rejected"][:prompt].tolist()
    for key, count, answer in zip(("chosen", "rejected"), counts, answers, strict=True):
        ids, labels = found[key], found[f"{key}_label"]
        assert len(ids) == len(labels) == prompt + count
        assert (labels[:prompt] == UNTRAINED).all()
        assert encoder.tokenizer.decode(ids[labels != UNTRAINED]) == answer


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_a_pair_gives_the_same(encoders: dict[str, PairEncoder], name: str) -> None:
    encoder, style = encoders[name], STYLES[name]
    good, bad = turns("Q", "Right."), turns("Q", "Wrong, I fear.")
    forms: list[dict[str, Any]] = [
        {"chosen": good, "rejected": bad},
        {"prompt": "Q", "chosen": good, "rejected": bad},
        {"prompt": "Q", "chosen": "Right.", "rejected": "Wrong, I fear."},
        {"prompt": good[:1], "chosen": good[1:], "rejected": bad[1:]},
        {"prompt": good[:1], "chosen": good[1], "rejected": bad[1]},
        {"prompt": good[:1], "chosen": good, "rejected": bad},
    ]
    found = [one(encoder, form) for form in forms]
    check(encoder, found[0], (style.trained("Right.") + style.tail, style.trained("Wrong, I fear.") + style.tail))
    for other in found[1:]:
        assert all((other[stream] == found[0][stream]).all() for stream in found[0])


def test_earlier_answers_belong_to_the_prompt_and_later_questions_are_not_trained(encoders: dict[str, PairEncoder]) -> None:
    encoder = encoders["chatml"]
    found = one(encoder, {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e", "f", "g")})
    check(encoder, found, ("d<|im_end|>\n", "e<|im_end|>\ng<|im_end|>\n"))
    assert encoder.tokenizer.decode(found["chosen"][: found[LENGTHS][0]]).endswith("c<|im_end|>\n<|im_start|>assistant\n")


TEXT = st.text(st.sampled_from(" \n\tab\u00e9-"), max_size=6)


@settings(max_examples=40, deadline=None)
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
def test_prompt_ids_are_equal_and_no_character_is_lost(encoders: dict[str, PairEncoder], prompt: str, chosen: str, rejected: str) -> None:
    # The answers' white space runs into the header's newline: tokens would lie across the cut.
    encoder = encoders["olmo"]
    batch = encoder([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    if chosen == rejected:
        assert batch.dropped == {SAME: 1}
        return
    found = {name: stream.values for name, stream in batch.streams.items()}
    check(encoder, found, (chosen + "<|endoftext|>", rejected + "<|endoftext|>"))
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        assert encoder.tokenizer.decode(found[key]) == f"<|endoftext|><|user|>\n{prompt}\n<|assistant|>\n{answer}<|endoftext|>"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Q", "chosen": "x", "rejected": "x"}, SAME),
        ({"prompt": "Q", "chosen": " x ", "rejected": "x"}, SAME),  # the template trims
        ({"chosen": turns("a", "b"), "rejected": turns("a")}, NOTHING),
        ({"chosen": turns("a", "b", "c"), "rejected": turns("a", "b", "d")}, NOTHING),
        ({"chosen": turns("a", "b"), "rejected": turns("c", "d")}, PROMPTS_DIFFER),
    ],
)
def test_pairs_that_teach_nothing(encoders: dict[str, PairEncoder], record: dict[str, Any], reason: str) -> None:
    assert encoders["llama3"]([record]).dropped == {reason: 1}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"prompt": "Q", "chosen": "x"}, "no key rejected"),
        ({"chosen": "x", "rejected": "y"}, "no prompt under prompt"),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "prompt: not a list of turns"),
        ({"prompt": "Q", "chosen": 3, "rejected": "y"}, "chosen: not a list of turns"),
    ],
)
def test_unusable_pairs(encoders: dict[str, PairEncoder], record: dict[str, Any], what: str) -> None:
    assert what in encoders["chatml"]([record]).faults[0][1]


def test_labelled_answers(tmp_path: Path) -> None:
    """KTO: a prompt, one answer and whether it was good."""
    form = chat_format(str(chat_folder(tmp_path, "chatml")))
    source = ChatSource(form, ("completion",), Masking(), reward_key="label", binary=True, prompt_key="prompt")
    rows = [
        {"prompt": turns("a", "b", "c"), "completion": "Yes", "label": True},
        {"prompt": "a", "completion": turns("a", "Yes"), "label": 0},
        {"prompt": "a", "completion": "Yes", "label": "good"},
    ]
    encoder = source.open()
    batch = encoder(rows)
    assert batch.streams["completion_reward"].values.tolist() == [1, -1] and len(batch.faults) == 1
    ids, labels = batch.streams["completion"].values, batch.streams["completion_label"].values
    assert encoder.tokenizer.decode(ids[labels != UNTRAINED]) == "Yes<|im_end|>\n" * 2
