# SPDX-License-Identifier: Apache-2.0
"""The three modes, with a model that counts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from support.scorers import Counting

KEYS = ["context", "text", "length", "finished", "message", "duration_seconds"]


def writer(longest: int = 64, **options: Any) -> Any:
    from megatron.generation.decode import DecodeSettings
    from megatron.generation.modes import Writer
    from megatron.tokenizer.others import CharLevelTokenizer

    return Writer(Counting(longest=longest, vocab_size=512), CharLevelTokenizer(), DecodeSettings(eod=ord("h"), **options))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_input_file_keeps_order_and_reports_what_did_not_fit(tmp_path: Path) -> None:
    from megatron.errors import DataError
    from megatron.generation.modes import input_file

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab\n\n  x \nlong" + "g" * 70 + "\nef\nzzA\n", encoding="utf-8")
    output = input_file(writer(maximum_tokens=4), prompts, "\n", None)
    assert output == tmp_path / "prompts.txt.output.jsonl"
    records = lines(output)
    assert [list(record) for record in records] == [KEYS] * 5
    assert [record["context"] for record in records] == ["ab", "x", "long" + "g" * 70, "ef", "zzA"]
    assert [record["text"] for record in records] == ["cdef", "yz{|", None, "g", "BCDE"]
    assert [record["length"] for record in records] == [4, 4, 0, 1, 4]
    assert [record["finished"] for record in records] == [False, False, False, True, False]
    assert records[2]["message"].startswith("WARNING") and "74 tokens" in records[2]["message"]
    assert all(record["message"] is None for record in records if record["text"] is not None)
    elsewhere = tmp_path / "new" / "out.jsonl"
    assert input_file(writer(maximum_tokens=1), prompts, "x", elsewhere) == elsewhere
    assert [record["context"][:2] for record in lines(elsewhere)] == ["ab", "lo"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "prompts.txt", "prompts.txt.output.jsonl"]

    with pytest.raises(DataError, match="there is no"):
        input_file(writer(), tmp_path / "absent", "\n", None)
    (tmp_path / "empty").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompt"):
        input_file(writer(), tmp_path / "empty", "\n", None)
    (tmp_path / "latin").write_bytes("\u00e9t\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text.* at byte 0"):
        input_file(writer(), tmp_path / "latin", "\n", None)


def test_unconditional_starts_after_an_eod_and_the_seed_repeats_it(tmp_path: Path) -> None:
    import torch

    from megatron.generation.decode import DecodeSettings, Sampling
    from megatron.generation.modes import Writer, unconditional
    from megatron.tokenizer.others import CharLevelTokenizer

    unconditional(writer(maximum_tokens=3, keep_logits=True), 20, tmp_path / "samples.txt")
    records = lines(tmp_path / "samples.txt")
    assert len(records) == 20 and all(
        record["context"] == "" and record["text"] == "\x02\x03" and record["length"] == 3 for record in records
    )
    assert [len(row) for row in records[0]["logits"]] == [512] * 3 and list(records[0]) == [*KEYS, "logits"]

    class Even(Counting):
        def next_logits(self, tokens: Any, cache: Any) -> Any:
            return torch.zeros(len(tokens), 512)

    rules = DecodeSettings(eod=0, sampling=Sampling(temperature=1.0), maximum_tokens=8)
    first, second, other = (Writer(Even(), CharLevelTokenizer(), rules, seed).write(["a"] * 4) for seed in (1, 1, 2))
    texts = [[record["text"] for record in records] for records in (first, second, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 4


def test_interactive_shows_growing_text_and_ends_with_the_input() -> None:
    from megatron.generation.modes import interactive

    screen = io.StringIO()
    interactive(writer(longest=40, maximum_tokens=3), "\n", io.StringIO("two words\n\n" + "l" * 50 + "\nab\n\n"), screen)
    said = screen.getvalue()
    assert said.count("Context prompt >>> ") == 4
    assert "Generated Text: tuv\n<press enter to continue>" in said and "Generated Text: cde" in said and "WARNING" in said
    several = io.StringIO()
    interactive(writer(maximum_tokens=2), "END", io.StringIO("one\ntwo aEND\n"), several)
    assert several.getvalue() == "Context prompt >>> Generated Text: bc\n<press enter to continue>"
