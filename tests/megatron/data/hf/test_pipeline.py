# SPDX-License-Identifier: Apache-2.0
"""From local files to streams: every form against what the template trains, and what is done again when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron.data.hf.pipeline import prepare
from megatron.data.hf.request import As, Columns, Data, PrepareRequest, Tokens
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.preprocess.encoders import UNTRAINED
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import TokenizerBackend, TokenizerKind, TokenizerSource, open_tokenizer
from tests.support.chat import chat_folder, turns

ANSWERS = [f"answer {number} of some" for number in range(9)]
TALKS = [turns("question?", answer) for answer in ANSWERS]
HEAD = "<|im_start|>user\nquestion?<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>\n"
EOD = "<|im_end|>"
"""The template ends every turn with it, so conversations get no other."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    chat_folder(tmp_path / "tokenizer", "chatml")
    yield tmp_path


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def request(root: Path, records: list[dict[str, Any]], columns: Columns = Columns(), **more: Any) -> PrepareRequest:  # noqa: B008
    tokens = Tokens(tokenizer=str(root / "tokenizer"), backend=TokenizerBackend.HF)
    return PrepareRequest(
        data=Data(dataset=lines(root / "in.jsonl", records)), columns=columns, **{"tokens": tokens, "folder": root / "out", **more}
    )


class Streams:
    """The streams of an output, decoded."""

    def __init__(self, folder: Path, *, name: str = "out") -> None:
        self.prefix = folder / name / f"{name}_"
        self.tokenizer = open_tokenizer(TokenizerSource(TokenizerKind.HF, str(folder / "tokenizer")))

    def ids(self, stream: str) -> list[list[int]]:
        dataset = IndexedDataset(f"{self.prefix}{stream}_document")
        return [dataset.get(index).tolist() for index in range(len(dataset))]

    def texts(self, stream: str) -> list[str]:
        return [self.tokenizer.decode([number for number in ids if number != UNTRAINED]) for ids in self.ids(stream)]


def test_text_is_written_with_its_end_always(folder: Path) -> None:
    done = prepare(request(folder, [{"text": "one", "id": 1}, {"text": ""}, {"text": "two \u00e9"}], count=False))
    assert Streams(folder).texts("text") == ["one" + EOD, "two \u00e9" + EOD]
    assert (folder / "out" / "dataset.jsonl").read_text(encoding="utf-8") == '{"text":"one"}\n{"text":"two \u00e9"}\n'
    results = done.results
    written = sum(map(len, Streams(folder).ids("text")))
    assert (results["num_documents"], results["token_count"], results["tokens_written"]) == (2, written - 2, {"text": written})
    assert results["status"] == "completed" and results["tokenized"] and not results["is_messages"] and results["text_column"] == "text"
    assert results["bin_path"] == str(folder / "out" / "out_text_document.bin") and Path(results["idx_path"]).exists()
    assert results["paths"] == {"train_data_paths": [str(folder / "out" / "out_text_document")]}
    kept = json.loads((folder / "out" / "pipeline_results.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in kept.items() if key not in ("stages", "kept", "elapsed_time")} == {
        key: value for key, value in results.items() if key != "elapsed_time"
    }


def test_chats_have_masks(folder: Path) -> None:
    done = prepare(request(folder, [{"messages": talk, "id": 1} for talk in TALKS]))
    streams = Streams(folder)
    assert streams.texts("messages") == [HEAD + answer + END for answer in ANSWERS]
    assert streams.texts("messages_label") == [answer + END for answer in ANSWERS]
    ids, labels = streams.ids("messages"), streams.ids("messages_label")
    assert all(label in (UNTRAINED, token) for one, other in zip(ids, labels, strict=True) for token, label in zip(one, other, strict=True))
    assert done.results["trained_tokens"] == sum(label != UNTRAINED for one in labels for label in one)
    assert list(done.results["paths"]) == ["train_data_paths", "train_label_data_paths"]
    assert done.results["preview"] == {"messages": f"{HEAD}[[{ANSWERS[0]}{END}]]"}
    exported = (folder / "out" / "dataset.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in exported] == [{"messages": talk} for talk in TALKS]


def test_chats_as_text(folder: Path) -> None:
    records = [{"messages": talk} for talk in TALKS]
    prepare(request(folder, records, Columns(wanted=As.MIDTRAIN), folder=folder / "mid"))
    middle = Streams(folder, name="mid").texts("text")
    assert middle == [f"question?\n\n{answer}" + EOD for answer in ANSWERS]
    prepare(request(folder, records, Columns(wanted=As.PRETRAIN), folder=folder / "pre"))
    assert Streams(folder, name="pre").texts("text") == [HEAD + answer + END for answer in ANSWERS]
    prepare(request(folder, records, Columns(as_written=True), folder=folder / "raw"))
    assert Streams(folder, name="raw").texts("text")[0] == str(TALKS[0]) + EOD


def test_a_template_that_ends_the_document_is_not_ended_twice(folder: Path) -> None:
    tokens = Tokens(tokenizer=str(chat_folder(folder / "tokenizer", "olmo")))
    prepare(request(folder, [{"messages": talk} for talk in TALKS], Columns(wanted=As.PRETRAIN), tokens=tokens))
    assert all(text.count("<|endoftext|>") == 2 and text.endswith("<|endoftext|>") for text in Streams(folder).texts("text"))


def test_pairs_and_judged_answers(folder: Path) -> None:
    pairs = [{"prompt": "question?", "chosen": answer, "rejected": answer[::-1]} for answer in ANSWERS]
    done = prepare(request(folder, pairs, folder=folder / "pairs"))
    streams = Streams(folder, name="pairs")
    assert streams.texts("rejected_label") == [answer[::-1] + END for answer in ANSWERS]
    assert streams.texts("chosen") == [HEAD + answer + END for answer in ANSWERS]
    sizes = [[len(one), len(other)] for one, other in zip(streams.ids("chosen"), streams.ids("rejected"), strict=True)]
    assert sizes == [[prompt + chosen, prompt + rejected] for prompt, chosen, rejected in streams.ids("lengths")]
    assert sum(map(sum, sizes)) == done.results["token_count"]
    assert len(done.results["paths"]) == 4
    judged = [{"prompt": "question?", "completion": answer, "label": number % 3 == 0} for number, answer in enumerate(ANSWERS)]
    done = prepare(request(folder, judged, folder=folder / "kto"))
    streams = Streams(folder, name="kto")
    assert streams.texts("messages_label") == [answer + END for answer in ANSWERS]
    assert streams.ids("messages_reward") == [[1 if number % 3 == 0 else -1] for number in range(9)]
    assert list(done.results["paths"])[-1] == "train_reward_data_paths"


def test_a_second_run_does_nothing_and_a_changed_one_only_what_depends(folder: Path) -> None:
    asked = request(folder, [{"messages": talk} for talk in TALKS])
    assert prepare(asked).fresh == ("LOAD", "DETECT", "EXPORT", "TOKENIZE")
    stamps = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir() if path.suffix in (".bin", ".idx", ".jsonl")}
    again = prepare(asked)
    assert again.fresh == () and again.results["token_count"] > 0
    assert stamps == {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir() if path.name in stamps}
    longer = replace(asked, tokens=replace(asked.tokens, max_length=1000))
    assert prepare(longer).fresh == ("TOKENIZE",)
    (folder / "out" / "dataset.jsonl").write_bytes(b"cut")
    assert prepare(longer).fresh == ("EXPORT",)
    (folder / "out" / "out_messages_label_document.bin").unlink()
    assert prepare(longer).fresh == ("TOKENIZE",)
    assert prepare(request(folder, [{"messages": talk} for talk in TALKS[1:]], tokens=longer.tokens)).fresh == (
        "LOAD", "DETECT", "EXPORT", "TOKENIZE",
    )  # fmt: skip
    midtrain = replace(longer, columns=Columns(wanted=As.MIDTRAIN))
    assert prepare(midtrain).fresh == ("DETECT", "EXPORT", "TOKENIZE")


def test_a_template_that_tells_the_day_tells_that_of_the_first_run(folder: Path) -> None:
    config = folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["chat_template"] = "{{ '<|im_start|>' + strftime_now('%H:%M:%S.%f') + '\\n' }}" + content["chat_template"]
    config.write_text(json.dumps(content), encoding="utf-8")
    asked = request(folder, [{"messages": talk} for talk in TALKS])
    first = prepare(asked)
    assert prepare(asked).fresh == ()
    (folder / "out" / "dataset.jsonl").unlink()
    (folder / "out" / "out_messages_document.bin").unlink()
    again = prepare(asked)
    assert again.fresh == ("EXPORT", "TOKENIZE") and again.results["preview"] == first.results["preview"]


def test_counting_writes_nothing_and_counts_what_would_be_written(folder: Path) -> None:
    for records in ([{"text": answer} for answer in ANSWERS], [{"messages": talk} for talk in TALKS]):
        asked = request(folder, records, count_only=True)
        before = sorted(folder.rglob("*"))
        counted = prepare(asked).results
        assert sorted(folder.rglob("*")) == before
        written = prepare(replace(asked, count_only=False, folder=folder / f"out{len(before)}")).results
        keys = ("num_documents", "token_count", "tokens_written", "tokens_per_doc", "trained_tokens")
        assert [counted[key] for key in keys] == [written[key] for key in keys]
    exported = prepare(replace(asked, count_only=False, tokenize=False)).results
    assert not exported["tokenized"] and exported["token_count"] == counted["token_count"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["dataset.jsonl", "pipeline_results.json"]


def test_limits_of_length(folder: Path) -> None:
    long = turns("question? " * 30, "yes")
    tokens = Tokens(tokenizer=str(folder / "tokenizer"), max_length=40)
    results = prepare(
        request(folder, [{"messages": long}, {"messages": TALKS[0]}, {"messages": turns("hi", "word " * 60)}], tokens=tokens)
    ).results
    assert results["dropped"] == {"nothing to train within 40 tokens": 1} and results["num_documents"] == 2
    assert results["notes"] == {"documents longer than 40 tokens": 1}


def test_failures_are_named_and_recorded(folder: Path) -> None:
    bad = [{"messages": TALKS[0]}, {"messages": turns("q", "a", system=None)[:1] + [{"role": "assistant"}]}]
    asked = request(folder, bad)
    with pytest.raises(DataError, match="has no content") as caught:
        prepare(asked)
    assert "in.jsonl:2" in str(caught.value)
    kept = json.loads((folder / "out" / "pipeline_results.json").read_text(encoding="utf-8"))
    assert kept["status"] == "failed" and "has no content" in kept["error"]
    allowed = prepare(replace(asked, skip_bad=1)).results
    assert (allowed["num_documents"], allowed["bad_records"]) == (1, 1) and "in.jsonl:2" in allowed["first_bad"][0][0]
    nothing = replace(asked, tokens=Tokens())
    with pytest.raises(ConfigError, match="no tokenizer is given"):
        prepare(nothing)
    other = chat_folder(folder / "other", "zephyr")
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="different tokenizers"):
        prepare(replace(asked, tokens=Tokens(tokenizer=str(folder / "tokenizer"), template_of=str(other))))
    text = request(folder, [{"text": "a"}], tokens=Tokens(), tokenize=False, count=False)
    assert prepare(text).results["num_documents"] == 1, "exporting text needs no tokenizer"


def test_tables_and_many_workers_give_the_same_bytes(folder: Path) -> None:
    asked = request(folder, [{"messages": talk, "id": number} for number, talk in enumerate(TALKS)])
    prepare(asked)
    (folder / "repo").mkdir()
    pq.write_table(pa.Table.from_pylist([{"messages": talk, "id": 0} for talk in TALKS]), folder / "repo" / "train-0.parquet")
    prepare(replace(asked, data=Data(dataset=str(folder / "repo")), folder=folder / "table", workers=2))
    for stream in ("messages", "messages_label"):
        first, other = (Streams(folder, name=name).ids(stream) for name in ("out", "table"))
        assert first == other and np.sum([len(one) for one in first]) > 100
