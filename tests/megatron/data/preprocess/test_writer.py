# SPDX-License-Identifier: Apache-2.0
"""Records to `.bin/.idx`: recorded bytes, order, what is left out, nothing left behind, and going on after any end."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.preprocess import resumable_output as journal
from megatron.data.preprocess import sources
from megatron.data.preprocess import writer as room
from megatron.data.preprocess.encoders import Dropped, EncodedRecords, Fault, MaskSource, StreamFormat, TextSource, gather
from megatron.data.preprocess.inputs import find
from megatron.data.preprocess.resumable_output import Counts
from megatron.data.preprocess.sources import Files, MadeHere
from megatron.data.preprocess.writer import EncodingProgress, Options, write
from megatron.errors import DataError
from megatron.tokenizer import TokenizerBackend, TokenizerKind, TokenizerSource, open_tokenizer

GOLDEN = Path(__file__).parents[3] / "golden" / "tokenizer"
TOKENIZER = TokenizerSource(TokenizerKind.HF, str(GOLDEN / "tokenizer.json"))
FAST = TokenizerSource(TokenizerKind.HF, str(GOLDEN / "tokenizer.json"), backend=TokenizerBackend.GIGATOKEN)
CHARACTERS = TokenizerSource(TokenizerKind.CHAR_LEVEL)
CORPUS = Files(find(GOLDEN / "corpus.jsonl"))
# Recorded from the reference with --append-eod, one and two workers alike.
RECORDED = {
    ".bin": "de64bb5be720f274f846a734209fc1256ff3a511357df28c2d43a0324089da8d",
    ".idx": "1c79735d0b4f0ac5da9e7bd1162647df6cbac16d5d441a3687ce0798b050e9d6",
}


def digests(prefix: Path) -> dict[str, str]:
    return {ending: hashlib.sha256(prefix.with_name(prefix.name + ending).read_bytes()).hexdigest() for ending in (".bin", ".idx")}


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[index].tolist() for index in range(len(dataset))]


@pytest.mark.parametrize(("workers", "tokenizer"), [(1, TOKENIZER), (1, FAST), (2, TOKENIZER)])
def test_bytes_equal_the_recording(tmp_path: Path, workers: int, tokenizer: TokenizerSource) -> None:
    written = write(CORPUS, TextSource(tokenizer), tmp_path / "deep" / "ds", Options(workers=workers))
    assert (written.documents, written.counts.dropped, written.tokens) == ({"text": 297}, {"empty": 3}, {"text": 84329})
    assert digests(written.files["text"]) == RECORDED
    assert [Path(where).name for where, _ in written.counts.first_dropped] == [f"corpus.jsonl:{line}" for line in (8, 134, 300)]
    names = ["ds_metadata.json", "ds_text_document.bin", "ds_text_document.idx"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == names
    facts = json.loads((tmp_path / "deep" / "ds_metadata.json").read_text())
    assert (facts["total_tokens"], facts["total_documents"], facts["dropped"]) == (84329, 297, {"empty": 3})


def test_every_key_is_what_it_would_be_alone(tmp_path: Path) -> None:
    written = write(CORPUS, TextSource(TOKENIZER, keys=("title", "text")), tmp_path / "ds")
    assert digests(written.files["text"]) == RECORDED, "where the reference wrote the text into every key's file"
    tokenizer = open_tokenizer(TOKENIZER)
    titles = [json.loads(line)["title"] for line in (GOLDEN / "corpus.jsonl").read_text().splitlines()]
    assert documents(written.files["title"]) == [[*tokenizer.encode(title), tokenizer.eod] for title in titles]


TEXTS = st.lists(st.text(max_size=40) | st.sampled_from(["", " ", "\n\n", "<|endoftext|>", "e\u0301", "\U0001f600" * 3]), max_size=30)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS, eod=st.booleans())
def test_tokens_to_file_and_back(texts: list[str], eod: bool) -> None:
    tokenizer = open_tokenizer(TOKENIZER)
    texts = [*texts, "one that is not empty"]
    with tempfile.TemporaryDirectory() as folder:
        source = MadeHere("made", lambda: ({"text": text} for text in texts))
        written = write(source, TextSource(TOKENIZER, append_eod=eod), Path(folder) / "ds")
        wanted = [tokenizer.encode(text) + [tokenizer.eod] * eod for text in texts if text]
        assert documents(written.files["text"]) == wanted
        assert written.counts.dropped.get("empty", 0) == texts.count("")
        read = [tokenizer.decode(ids[: len(ids) - eod]) for ids in documents(written.files["text"])]
        assert read == [text for text in texts if text]


@dataclass(frozen=True)
class Rewards:
    """One float per record; faults and drops on request."""

    def open(self) -> Rewards:
        return self

    @property
    def streams(self) -> dict[str, StreamFormat]:
        return {"reward": StreamFormat(np.dtype("<f4"), integral=np.dtype("<i4"))}

    def __call__(self, records: Sequence[Any]) -> EncodedRecords:
        outcomes: list[Any] = []
        for record in records:
            reward = record["reward"]
            outcomes.append(
                Fault("no number") if reward is None else Dropped("too much") if reward > 9 else {"reward": np.array([reward], "f4")}
            )
        return gather(outcomes, self.streams)


@pytest.mark.parametrize(("rewards", "dtype"), [([1, -1, 3, 0], "int32"), ([1, 0.5, -1, 2], "float32")])
def test_rewards_are_whole_numbers_or_floats(tmp_path: Path, rewards: list[float], dtype: str) -> None:
    written = write(MadeHere("made", lambda: ({"reward": reward} for reward in rewards)), Rewards(), tmp_path / "ds")
    dataset = IndexedDataset(written.files["reward"])
    assert dataset.dtype == dtype and dataset.values.tolist() == rewards


def test_bad_records_end_the_run_or_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = ['{"reward": 1}', "{broken", '{"reward": null}', '{"reward": 12}', '{"reward": 2}']
    path.write_text("\n".join(lines))
    for skip in (0, 1):
        with pytest.raises(DataError, match="2 of the first 4 records cannot be used") as caught:
            write(Files(find(path)), Rewards(), tmp_path / "ds", Options(skip_bad=skip))
        assert f"{path}:2: not JSON" in caught.value.what and f"{path}:3: no number" in caught.value.what
        assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]
    counts = write(Files(find(path)), Rewards(), tmp_path / "ds", Options(skip_bad=2)).counts
    assert (counts.documents, counts.bad, counts.dropped, counts.records) == (2, 2, {"too much": 1}, 5)
    assert counts.first_dropped == [(f"{path}:4", "too much")]


def test_nothing_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record gave a document"):
        write(MadeHere("made", lambda: [{"text": ""}] * 3), TextSource(CHARACTERS), tmp_path / "ds")
    assert list(tmp_path.iterdir()) == []


class Ending(Exception):
    """The run ends here."""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(journal, "RECORD_EVERY_S", 0.0)
    monkeypatch.setattr(sources, "BLOCK_RECORDS", 10)
    made: list[int] = []
    until = 700

    def records() -> Any:
        for number in range(1000):
            if number >= until:
                raise Ending
            made.append(number)
            yield {"text": f"document {number} " * (number % 5)}

    source = MadeHere("made", records)
    with pytest.raises(Ending):
        write(source, TextSource(CHARACTERS), tmp_path / "ds", Options(workers=workers))
    assert [entry.name for entry in tmp_path.iterdir()] == ["ds.partial"]
    # What was written after the last record of progress is cut off.
    with (tmp_path / "ds.partial" / "text.values").open("ab") as file:
        file.write(b"torn")
    until = 1000
    seen: list[Any] = []
    written = write(_Watched(source, seen), TextSource(CHARACTERS), tmp_path / "ds", Options(workers=workers))
    whole = write(source, TextSource(CHARACTERS), tmp_path / "whole")
    assert digests(written.files["text"]) == digests(whole.files["text"])
    assert (written.counts.documents, written.counts.dropped) == (800, {"empty": 200})
    assert 500 <= seen[0].offset <= 700
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("ds")) == [
        "ds_metadata.json",
        "ds_text_document.bin",
        "ds_text_document.idx",
    ]


@dataclass(frozen=True)
class _Watched:
    source: MadeHere
    starts: list[Any]

    @property
    def total_bytes(self) -> None:
        return None

    def facts(self) -> Any:
        return self.source.facts()

    def blocks(self, start: Any) -> Any:
        self.starts.append(start)
        return self.source.blocks(start)


def test_an_unfinished_run_with_other_settings_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RECORD_EVERY_S", 0.0)

    def breaking() -> Any:
        yield from [{"text": "abc"}] * 600
        raise Ending

    with pytest.raises(Ending):
        write(MadeHere("made", breaking), TextSource(CHARACTERS), tmp_path / "ds")
    assert (tmp_path / "ds.partial" / "journal.json").exists()
    written = write(MadeHere("made", lambda: [{"text": "abc"}] * 3), TextSource(CHARACTERS, append_eod=False), tmp_path / "ds")
    assert written.tokens == {"text": 9}


@pytest.mark.parametrize("renamed", range(5))
def test_renaming_that_was_cut_off_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int) -> None:
    source = MaskSource(TOKENIZER, True, (27,))
    whole = write(CORPUS, source, tmp_path / "whole")
    old = write(MadeHere("old", lambda: [{"text": "old"}]), source, tmp_path / "ds")
    left, real = [renamed], os.replace

    def replace(here: Any, there: Any) -> None:
        if ".partial" not in str(there):
            left[0] -= 1
            if left[0] < 0:
                raise Ending
        real(here, there)

    with monkeypatch.context() as patch, pytest.raises(Ending):
        patch.setattr(os, "replace", replace)
        write(CORPUS, source, tmp_path / "ds")
    # An index beside data of another run must never be seen: either there is none, or it fits.
    for prefix in old.files.values():
        if prefix.with_name(prefix.name + ".idx").exists():
            IndexedDataset(prefix)
    written = write(CORPUS, source, tmp_path / "ds")
    for stream in ("text", "label"):
        assert digests(written.files[stream]) == digests(whole.files[stream])
    assert not (tmp_path / "ds.partial").exists()


def test_two_runs_do_not_write_the_same_files(tmp_path: Path) -> None:
    def records() -> Any:
        yield {"text": "abc"}
        with pytest.raises(DataError, match="another run is writing"):
            write(MadeHere("made", lambda: [{"text": "b"}]), TextSource(CHARACTERS), tmp_path / "ds")

    assert write(MadeHere("made", records), TextSource(CHARACTERS), tmp_path / "ds").tokens == {"text": 4}


def test_an_encoding_process_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an encoding process died"):
        write(CORPUS, _Dying(), tmp_path / "ds", Options(workers=2))


@dataclass(frozen=True)
class _Dying:
    lives: int = field(default_factory=os.getpid)

    def open(self) -> Any:
        if os.getpid() != self.lives:
            os._exit(9)
        return Rewards()


def test_speed_counts_from_where_the_run_was_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.time, "monotonic", lambda: 100.0)
    progress = EncodingProgress(10_000_000, Counts(documents=500, source_bytes=4_000_000), 100, None)
    line = progress.line(Counts(documents=800, source_bytes=7_000_000), 103.0)
    assert line == "800 documents, 100.0 docs/s, 1.00 MB/s, 70.0 %, 3 s left"
    counted = EncodingProgress(None, Counts(), 100, 1000)
    assert counted.line(Counts(documents=250), 105.0) == "250 documents, 50.0 docs/s, 25.0 %, 15 s left"


def test_lines_come_at_intervals(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    logging.getLogger("megatron").propagate = True
    with caplog.at_level(logging.INFO, logger="megatron"), EncodingProgress(None, Counts(), 100, None) as progress:
        for step in range(60):
            now[0] = step * 1.0
            progress.update(Counts(documents=step * 6))
    said = [record.message.split(",")[0] for record in caplog.records]
    assert said == ["102 documents", "204 documents", "306 documents"], "ten seconds and a hundred documents apart at least"
