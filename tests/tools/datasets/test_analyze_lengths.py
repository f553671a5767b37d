# SPDX-License-Identifier: Apache-2.0
"""analyze_lengths.py on files of each kind: what is told, its JSON and its picture."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.tree import ROOT
from tests.support.indexed import IndexedDatasetBuilder

sys.path.insert(0, str(ROOT / "tools" / "datasets"))

import analyze_lengths  # noqa: E402

TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
PROMPT, CHOSEN, REJECTED = [3, 5, 2, 1], [8, 6, 2, 9], [4, 9, 5, 1]


def write(prefix: Path, documents: list[list[int]]) -> str:
    with IndexedDatasetBuilder(prefix, np.int32) as builder:
        for document in documents:
            builder.add_document(document)
        builder.finalize()
    return str(prefix)


def write_pairs(prefix: str) -> None:
    """Token and label files of both sides; a row as long as its prompt trains nothing."""
    for side, sizes in (("chosen", CHOSEN), ("rejected", REJECTED)):
        write(Path(f"{prefix}_{side}_document"), [[7] * size for size in sizes])
        labels = [[-100] * prompt + [7] * (size - prompt) for prompt, size in zip(PROMPT, sizes, strict=True)]
        write(Path(f"{prefix}_{side}_label_document"), labels)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert analyze_lengths.main([*words, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_pairs_are_found_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(tmp_path / "p")
    write_pairs(prefix)
    by_name = told(capsys, prefix)
    means = {name: column["lengths"]["mean"] for name, column in by_name["columns"].items()}
    longest = [max(pair) for pair in zip(CHOSEN, REJECTED, strict=True)]
    assert means == {
        "prompt": np.mean(PROMPT),
        "chosen": np.mean(CHOSEN),
        "rejected": np.mean(REJECTED),
        "max": np.mean(longest),
        "total": np.mean(CHOSEN) + np.mean(REJECTED),
    }
    assert by_name["pairs"] and by_name["nothing_trained"]["1024"] == 0.5 and by_name["recommended"] == 16
    chosen, rejected = f"{prefix}_chosen_document", f"{prefix}_rejected_document"
    by_flag = told(capsys, chosen, "--rejected", rejected)
    assert {**by_flag, "inputs": [prefix]} == by_name
    # as stored numbers, with and without the token files
    answers = [[p, c - p, r - p] for p, c, r in zip(PROMPT, CHOSEN, REJECTED, strict=True)]
    for stored in (str(tmp_path / "s"), prefix):
        write(Path(f"{stored}_lengths_document"), answers)
        assert told(capsys, stored)["columns"] == told(capsys, f"{stored}_lengths_document")["columns"] == by_name["columns"]
    write(Path(f"{prefix}_lengths_document"), [[1, 2, 3]] * 4)
    assert analyze_lengths.main([prefix]) == 77 and "not those of the token files" in capsys.readouterr().err


def test_single_sequences_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a_document", [[1, 2, 3], [4]])
    two = write(tmp_path / "b_document", [[1] * 5])
    found = told(capsys, one, two)
    assert list(found["columns"]) == ["length"] and found["samples"] == 3 and found["prompt_exceeds"] is None and found["tokens"] == 9
    write(tmp_path / "a_label_document", [[-100, 2, -100], [-100]])
    found = told(capsys, one)
    assert found["columns"]["prompt"]["lengths"]["mean"] == 1 and found["nothing_trained"]["1024"] == 0.5


def test_tables_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(tmp_path / "p")
    write_pairs(prefix)
    words = ["--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png"), "--tokens-per-second", "10", "--max-length", "8"]
    assert analyze_lengths.main([prefix, *words]) == 0
    out = capsys.readouterr().out
    assert "4 preference pairs" in out and "recommended max_length 16" in out and "hours/epoch" in out
    assert json.loads((tmp_path / "o.json").read_text())["max_length"] == 8
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp.*"))


def test_texts_are_measured_as_they_would_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.tokenizer.hugging_face import open_hf

    file = tmp_path / "t.jsonl"
    texts = ["one two three", "", "four"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no JSON\n", encoding="utf-8")
    words = [str(file), "--tokenizer-type", "HFTokenizer", "--vocab-file", str(TOKENIZER / "tokenizer.json")]
    assert analyze_lengths.main(words) == 77 and "t.jsonl:4" in capsys.readouterr().err
    found = told(capsys, *words, "--skip-bad", "1")
    tokenizer = open_hf(str(TOKENIZER / "tokenizer.json"))
    assert found["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in texts if text)
    assert found["left_out"] == {"malformed": 1, "empty": 1} and found["samples"] == 2
    assert analyze_lengths.main([*words, "--skip-bad", "1"]) == 0 and "left out: 1 records (malformed)" in capsys.readouterr().out
    assert analyze_lengths.main([*words, "--tokenizer-path", "x"]) == 77 and "do not go together" in capsys.readouterr().err


def test_pairs_are_measured_as_they_would_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.data.chat.pairs import PairSource
    from megatron.data.chat.sources import chat_format
    from megatron.data.preprocess.inputs import find
    from megatron.data.preprocess.sources import Files
    from megatron.data.preprocess.writer import write as write_set

    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, tmp_path)
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    rows: list[dict[str, Any]] = [{"prompt": "P" * n, "chosen": "good " * n, "rejected": "bad"} for n in range(1, 6)]
    rows.append({"prompt": "x", "chosen": "same", "rejected": "same"})
    # without a prompt: what both conversations begin with
    talk = [{"role": "user", "content": "why?"}]
    rows.append({side: [*talk, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")})
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_records = told(capsys, str(file), "--tokenizer-path", str(tmp_path))
    assert sum(by_records["left_out"].values()) == 1 and by_records["samples"] == 6
    write_set(Files(find([str(file)])), PairSource(chat_format(str(tmp_path))), tmp_path / "set")
    assert told(capsys, str(tmp_path / "set"))["columns"] == by_records["columns"]
    for name in ("chosen", "rejected"):  # and without the stored lengths
        assert told(capsys, str(tmp_path / f"set_{name}_document"))["tokens"] == pytest.approx(
            by_records["columns"][name]["lengths"]["mean"] * 6
        )


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a_document", [[1, 2]])
    write_pairs(str(tmp_path / "p"))
    for words, said in (
        ([str(tmp_path / "none")], "does not exist"),
        ([one, str(tmp_path / "p")], "others single sequences"),
        ([one, "--max-length", "0"], "--max-length 0"),
        ([one, "--plot", "x.exe"], "--plot x.exe"),
        ([one, "--rejected", str(tmp_path / "p_chosen_document")], "1 chosen documents, 4 rejected"),
        ([write(tmp_path / "e", [])], "no sample"),
    ):
        assert analyze_lengths.main(words) == 77 and said in capsys.readouterr().err, words
