# SPDX-License-Identifier: Apache-2.0
"""The chat tool as a user calls it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import ConfigError, DataError
from tests.support.chat import GOLDEN, chat_folder, turns

SCRIPT = Path(__file__).parents[3] / "tools" / "datasets" / "preprocess_data_with_chat_template.py"
RECORDED = json.loads((GOLDEN / "chat" / "recordings.json").read_text())
FLAGS = {
    "chat_default": [],
    "chat_only_last": ["--only-last"],
    "chat_for_rm": ["--for-rm"],
    "chat_reward": ["--reward-key", "reward"],
    "pairs_default": ["--jsonl-keys", "chosen", "rejected"],
    "pairs_for_rm": ["--jsonl-keys", "chosen", "rejected", "--for-rm"],
}


def loaded() -> Any:
    """The face's module. Loaded once, before the forks."""
    spec = importlib.util.spec_from_file_location("chat_face", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


face = loaded().main


def command(tmp_path: Path, kind: str, *more: str, tokenizer: Path = GOLDEN / "tokenizer") -> list[str]:
    source = GOLDEN / "chat" / f"{kind}.jsonl"
    return ["--input", str(source), "--tokenizer-path", str(tokenizer), "--output-prefix", str(tmp_path / "ds"), *more]


@pytest.mark.parametrize("case", sorted(FLAGS))
def test_files_equal_the_recordings(tmp_path: Path, case: str) -> None:
    assert face(command(tmp_path, case.split("_")[0], *FLAGS[case])) == 0
    written = {path.name for path in tmp_path.iterdir()} - {"ds_metadata.json"}
    assert written == set(RECORDED[case])
    for name, digest in RECORDED[case].items():
        # The reference cuts fractions of rewards away; here they are kept, so that file and its index differ.
        if "reward" not in name:
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest, name
    if case == "chat_reward":
        rewards = IndexedDataset(tmp_path / "ds_conversation_reward_document")
        given = [json.loads(line)["reward"] for line in (GOLDEN / "chat" / "chat.jsonl").read_text().splitlines()]
        assert rewards.dtype == np.float32 and [rewards[i][0] for i in range(60)] == pytest.approx(given)


def test_as_a_user_calls_it(tmp_path: Path) -> None:
    words = command(tmp_path, "chat", "--workers", "2", "--reward-key", "good", "--binary-reward", "--num-docs", "60")
    said = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "trained: 6537 tokens, 38.8 % of those with labels" in said.stdout
    assert "39 conversations cut as the reference cuts them" in said.stdout and "--turn-borders exact keeps them" in said.stdout
    assert "<|assistant|>\n[[object.__radd__(self, \n" in said.stdout
    assert IndexedDataset(tmp_path / "ds_conversation_reward_document").dtype == np.int32
    facts = json.loads((tmp_path / "ds_metadata.json").read_text())
    assert len(facts["chat_template"]["digest"]) == 16 and facts["tokenizer"]["vocab_size"] == 512


def test_exact_borders_keep_the_text_and_drop_what_teaches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert face(command(tmp_path, "chat", "--turn-borders", "exact", "--only-last")) == 0
    assert "left out 6 (nothing to train)" in capsys.readouterr().out
    assert len(IndexedDataset(tmp_path / "ds_conversation_document")) == 54


def test_pairs(tmp_path: Path) -> None:
    assert face(command(tmp_path, "pairs", "--pairs")) == 0
    chosen, rejected, lengths = (IndexedDataset(tmp_path / f"ds_{name}_document") for name in ("chosen", "rejected", "lengths"))
    assert len(chosen) == len(rejected) == len(lengths) > 40
    for one, other, (prompt, first, second) in zip(chosen, rejected, lengths, strict=True):
        assert (len(one), len(other)) == (prompt + first, prompt + second) and (one[:prompt] == other[:prompt]).all()


def test_labelled_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Q", "completion": "yes", "label": True}, {"prompt": turns("a", "b", "c"), "completion": "no", "label": False}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer-path", str(GOLDEN / "tokenizer"), "--output-prefix", str(tmp_path / "ds")]
    kto = ["--prompt-key", "prompt", "--jsonl-keys", "completion", "--reward-key", "label", "--binary-reward"]
    assert face([*words, *kto]) == 0
    assert "<|assistant|>\n[[yes\n<|endoftext|>]]" in capsys.readouterr().out
    rewards = IndexedDataset(tmp_path / "ds_completion_reward_document")
    assert [rewards[0].tolist(), rewards[1].tolist()] == [[1], [-1]] and rewards.dtype == np.int32


def test_marked_templates_are_cut_exactly_and_a_given_template_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chat_folder(tmp_path / "tok", "chatml")
    (tmp_path / "in.jsonl").write_text(json.dumps({"talk": turns("a", "b")}) + "\n")
    words = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer-path", str(tokenizer), "--jsonl-keys", "talk"]
    shutil.copy(GOLDEN / "chat" / "templates" / "marked.jinja", tmp_path)
    assert face([*words, "--output-prefix", str(tmp_path / "a")]) == 0
    assert "assistant\n[[b<|im_end|>\n]]" in capsys.readouterr().out
    assert face([*words, "--output-prefix", str(tmp_path / "b"), "--chat-template", str(tmp_path / "marked.jinja")]) == 0
    assert "assistant\n[[b<|im_end|>]]\n" in capsys.readouterr().out
    assert face([*words, "--output-prefix", str(tmp_path / "c"), "--no-mask"]) == 0
    assert not (tmp_path / "c_talk_label_document.bin").exists() and "[[b" not in capsys.readouterr().out


def test_a_conversation_that_cannot_be_masked_is_named(tmp_path: Path) -> None:
    tokenizer = chat_folder(tmp_path / "tok", "qwen3")
    rows = [turns("a", "b"), turns("a", "<think>x</think>b", "c", "d")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"conversation": row}) + "\n" for row in rows))
    words = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer-path", str(tokenizer), "--output-prefix", str(tmp_path / "ds")]
    with pytest.raises(DataError, match="not prefix-stable") as caught:
        face(words)
    assert caught.value.where == f"{tmp_path / 'in.jsonl'}:2" and not list(tmp_path.glob("ds*"))
    assert face([*words, "--skip-bad", "1"]) == 0
    assert len(IndexedDataset(tmp_path / "ds_conversation_document")) == 1


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--pairs", "--for-rm"], "does not go with --for-rm"),
        (["--pairs", "--jsonl-keys", "one"], "two keys"),
        (["--binary-reward"], "how a reward is stored"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path: Path, words: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        face(command(tmp_path, "pairs", *words))
