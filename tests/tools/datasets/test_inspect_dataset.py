# SPDX-License-Identifier: Apache-2.0
"""inspect_dataset.py: numbers against plain Python, masks shown, and labels that do not fit are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.inspect.inspecting import compare, labels_beside, statistics
from support.tree import ROOT
from tests.support.indexed import IndexedDatasetBuilder

sys.path.insert(0, str(ROOT / "tools" / "datasets"))

import inspect_dataset  # noqa: E402

TOKENIZER = ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(ROOT / "tests" / "golden" / "tokenizer" / "tokenizer.json")]
DOCUMENT = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=8)


def write(prefix: Path, documents: list[list[int]], dtype: object = np.int32) -> str:
    with IndexedDatasetBuilder(prefix, dtype) as builder:  # type: ignore[arg-type]
        for document in documents:
            builder.add_document(document)
        builder.finalize()
    return str(prefix)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(DOCUMENT, max_size=8))
@example(documents=[[], [(1, True), (7, False)], [], [], [(7, True), (2, False)]])
def test_statistics_are_those_of_plain_python(tmp_path: Path, documents: list[list[tuple[int, bool]]]) -> None:
    tokens = IndexedDataset(write(tmp_path / "t", [[token for token, _ in document] for document in documents]))
    labels = IndexedDataset(write(tmp_path / "l", [[token if on else -100 for token, on in document] for document in documents]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.data.inspect.inspecting.BLOCK_VALUES", 5)
        found = statistics(tokens, labels, vocab_size=30, eod=7)
        assert compare(tokens, labels).ok
    flat = [pair for document in documents for pair in document]
    assert (found.documents, found.values, found.marked) == (len(documents), len(flat), None)
    assert found.empty == sum(not document for document in documents)
    assert found.outside == sum(token >= 30 for token, _ in flat)
    assert found.eod_values == sum(token == 7 for token, _ in flat)
    assert found.eod_ends == sum(document[-1][0] == 7 for document in documents if document)
    assert found.trained == sum(on for _, on in flat)
    assert found.untrained == sum(not any(on for _, on in document) for document in documents)
    assert (found.smallest, found.largest) == ((min(t for t, _ in flat), max(t for t, _ in flat)) if flat else (None, None))
    if documents:
        lengths = [len(document) for document in documents]
        assert found.lengths == {
            "min": min(lengths),
            "mean": pytest.approx(np.mean(lengths)),
            **{name: pytest.approx(np.percentile(lengths, q)) for name, q in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99))},
            "max": max(lengths),
        }


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(DOCUMENT, min_size=1, max_size=8), wrong=st.sets(st.integers(0, 63), max_size=5))
def test_every_wrong_label_is_found(tmp_path: Path, documents: list[list[tuple[int, bool]]], wrong: set[int]) -> None:
    places = [(document, position) for document, row in enumerate(documents) for position in range(len(row))]
    spoilt = {places[number] for number in wrong if number < len(places)}
    tokens = write(tmp_path / "t", [[token for token, _ in row] for row in documents])
    labels = [
        [token + 1 if (document, position) in spoilt else token if on else -100 for position, (token, on) in enumerate(row)]
        for document, row in enumerate(documents)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.data.inspect.inspecting.BLOCK_VALUES", 5)
        found = compare(IndexedDataset(tokens), IndexedDataset(write(tmp_path / "l", labels)), show=3)
    assert found.differing == len(spoilt) and found.ok == (not spoilt)
    assert [(place.document, place.position) for place in found.first] == sorted(spoilt)[:3]
    assert all(place.label == place.token + 1 == labels[place.document][place.position] for place in found.first)


def show(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = inspect_dataset.main(list(words))
    return status, *capsys.readouterr()


def test_masks_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.tokenizer.hugging_face import open_hf

    tokenizer = open_hf(TOKENIZER[-1])
    asked, answered = tokenizer.encode("What is it?"), tokenizer.encode(" A \x1b[2J lamp")
    prefix = write(tmp_path / "c_document", [[*asked, *answered, tokenizer.eod]])
    assert labels_beside(prefix) is None
    write(tmp_path / "c_label_document", [[-100] * len(asked) + answered + [-100]])
    status, out, _ = show(capsys, prefix, *TOKENIZER)
    assert status == 0 and "fit the tokens" in out and "100.0% of the documents end in one" in out and "\x1b" not in out
    assert "[[What is it?]] A \\x1b[2J lamp[[" in out
    _, out, _ = show(capsys, prefix, *TOKENIZER, "--color", "always")
    assert "\x1b[2mWhat is it?\x1b[0m\x1b[32m A \\x1b[2J lamp\x1b[0m" in out
    # a terminal, then the same with NO_COLOR
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[2m" in show(capsys, prefix)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = show(capsys, prefix)
    assert "\x1b" not in out and f"[[{' '.join(map(str, asked))}]] {' '.join(map(str, answered))} [[{tokenizer.eod}]]" in out
    # the labels themselves
    status, out, _ = show(capsys, str(tmp_path / "c_label_document"), *TOKENIZER)
    assert status == 0 and f"[[({len(asked)} x -100)]]" in out
    status, out, _ = show(capsys, prefix, *TOKENIZER, "--json")
    told: dict[str, Any] = json.loads(out)
    assert told["check"]["ok"] and told["statistics"]["trained"] == len(answered) and told["labels"].endswith("c_label_document")
    assert [part["trained"] for part in told["samples"][0]["spans"]] == [False, True, False]
    assert [token for part in told["samples"][0]["spans"] for token in part["ids"]] == [*asked, *answered, tokenizer.eod]


def test_labels_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "a_text_document", [[1, 2], [3, 4, 5]])
    labels = write(tmp_path / "a_label_document", [[-100, 2], [3, 9, -1]])
    assert labels_beside(prefix) == labels  # the mask tool's names
    status, out, _ = show(capsys, prefix)
    assert status == 77 and "document 1, position 1: token 4, label 9" in out and "document 1, position 2: token 5, label -1" in out
    other = write(tmp_path / "other", [[-100, 2], [3, -100], [1]])
    status, out, _ = show(capsys, prefix, "--labels", other, "--json")
    assert status == 77 and json.loads(out)["check"]["problems"] == [
        "2 documents of tokens, 3 of labels",
        "document 1: 3 tokens, 2 labels",
    ]
    assert show(capsys, prefix, "--labels", "none")[0] == 0


def test_odd_files_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = write(tmp_path / "r_reward_document", [[0.5], [-1.5]], np.float32)  # type: ignore[list-item]
    status, out, _ = show(capsys, rewards, "--samples", "2")
    assert status == 0 and "-1.5, 0.5" in out and "trained" not in out
    empty = write(tmp_path / "e", [])
    assert show(capsys, empty, *TOKENIZER)[0] == 0
    many = write(tmp_path / "m", [[600 + number] for number in range(9)])
    status, out, _ = show(capsys, many, *TOKENIZER, "--samples", "3", "--random", "1")
    assert status == 0 and out.count("--- document") == 3 and "OUTSIDE VOCABULARY" in out
    assert show(capsys, many, "--start", "10")[0] == 77 and show(capsys, str(tmp_path / "none"))[0] == 77
    long = write(tmp_path / "long", [list(range(20))])
    assert "0 1 2 ... (17 more)" in show(capsys, long, "--max-tokens", "3")[1]
