# SPDX-License-Identifier: Apache-2.0
"""preprocess_data.py and the mask tool with the recorded commands of the reference: the recorded bytes, or better ones where it erred."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron.data.indexed_dataset import IndexedDataset
from support.tree import ROOT

GOLDEN = ROOT / "tests" / "golden"
RECORDINGS: dict[str, Any] = json.loads((GOLDEN / "tools" / "recordings.json").read_text())
INPUTS = {
    "out/data/corpus.jsonl": GOLDEN / "tokenizer" / "corpus.jsonl",
    "out/data/corpus_b.jsonl": GOLDEN / "tools" / "corpus_b.jsonl",
    "out/data/mask.jsonl": GOLDEN / "tools" / "mask.jsonl",
    "out/tokenizer": GOLDEN / "tokenizer",
}
# What the reference got wrong: it wrote the text under every key, and failed without a pattern.
DEFECTS = {"pre_keys", "pre_keys_other", "mask_nopattern"}
EXACT = [name for name, recorded in RECORDINGS.items() if name.startswith(("pre_", "mask_")) and name not in DEFECTS]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "datasets" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(case: str, folder: Path, *more: str) -> None:
    """The recorded command with our paths."""
    command = RECORDINGS[case]["command"]
    for theirs, ours in INPUTS.items():
        command = command.replace(theirs, str(ours))
    words = [str(folder / "ds") if word.startswith("out/tools") else word for word in shlex.split(command)]
    assert tool(Path(words[1]).stem).main([*words[2:], *more]) == 0


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[index].tolist() for index in range(len(dataset))]


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("backend", ["hf", "auto"])
def test_recorded_commands_give_the_recorded_bytes(tmp_path: Path, case: str, backend: str) -> None:
    run(case, tmp_path, "--tokenizer-backend", backend)
    assert digests(tmp_path) == RECORDINGS[case]["files"]


def test_every_key_gets_its_own_text(tmp_path: Path) -> None:
    run("pre_keys", tmp_path)
    recorded, ours = RECORDINGS["pre_keys"]["files"], digests(tmp_path)
    assert recorded["ds_title_document.bin"] == recorded["ds_text_document.bin"], "the recording holds the text twice"
    assert {name: ours[name] for name in ours if "text" in name} == {name: recorded[name] for name in recorded if "text" in name}
    (tmp_path / "alone").mkdir()
    run("pre_keys_other", tmp_path / "alone")
    assert digests(tmp_path / "alone") == {name: ours[name] for name in ours if "title" in name}
    assert ours["ds_title_document.bin"] != recorded["ds_title_document.bin"]


def test_without_a_pattern_everything_is_trained(tmp_path: Path) -> None:
    assert RECORDINGS["mask_nopattern"]["status"] == 1
    run("mask_nopattern", tmp_path)
    assert documents(tmp_path / "ds_text_document") == documents(tmp_path / "ds_label_document")
    assert digests(tmp_path)["ds_text_document.bin"] == RECORDINGS["mask_eod"]["files"]["ds_text_document.bin"]


def test_facts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("mask_eod", tmp_path, "--num-docs", "40", "--log-interval", "1")
    said = capsys.readouterr().out
    assert "trained: 2591 tokens, 48.7 %" in said and "7 texts without the pattern, trained whole" in said and "Total tokens: 5323" in said
    facts = json.loads((tmp_path / "ds_metadata.json").read_text())
    assert (facts["trained_tokens"], facts["token_counts"], facts["records"]) == (2591, {"text": 5323, "label": 5323}, 40)
    assert facts["tokenizer"]["digest"] and facts["sources"][0]["digest"].startswith("sha256:") and facts["args"]["append_eod"] is True


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--output-prefix", "{folder}/"], "is a folder"),
        (["--output-prefix", "{folder}/ds", "--jsonl-keys", "body"], "no text under 'body'"),
        (["--output-prefix", "{folder}/ds", "--workers", "0"], "workers must be at least 1, got 0"),
        (["--output-prefix", "{folder}/ds", "--skip-bad", "-1"], "--skip-bad must be 0 or more"),
        (["--output-prefix", "{folder}/ds", "--tokenizer-backend", "gigatoken", "--tokenizer-type", "CharLevelTokenizer"], "gigatoken"),
    ],
)
def test_bad_commands_are_told(tmp_path: Path, flags: list[str], what: str) -> None:
    from megatron.errors import NeoXError

    basics = ["--input", str(GOLDEN / "tools" / "mask.jsonl"), "--tokenizer-type", "HFTokenizer"]
    basics += ["--vocab-file", str(GOLDEN / "tokenizer" / "tokenizer.json")]
    with pytest.raises(NeoXError, match=what):
        tool("preprocess_data").main([*basics, *(flag.format(folder=tmp_path) for flag in flags)])
    assert list(tmp_path.iterdir()) == []
