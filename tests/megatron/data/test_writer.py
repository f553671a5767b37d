# SPDX-License-Identifier: Apache-2.0
"""Documents to `.bin/.idx`: recorded bytes, order, nothing left behind after a failure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.data.encoders import TextSource
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.texts import read_texts
from megatron.data.writer import write
from megatron.errors import DataError
from megatron.tokenizer import TokenizerKind, TokenizerSource

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer"
SOURCE = TextSource(TokenizerSource(TokenizerKind.HF, str(GOLDEN / "tokenizer.json")))
# Recorded from the reference with --append-eod, one and two workers alike.
RECORDED = {
    ".bin": "de64bb5be720f274f846a734209fc1256ff3a511357df28c2d43a0324089da8d",
    ".idx": "1c79735d0b4f0ac5da9e7bd1162647df6cbac16d5d441a3687ce0798b050e9d6",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_equal_the_recording(tmp_path: Path, workers: int) -> None:
    written = write(read_texts([GOLDEN / "corpus.jsonl"]), SOURCE, tmp_path / "deep" / "ds", workers=workers)
    assert (written.documents, written.dropped, written.tokens) == (297, 3, {"text": 84329})
    prefix = written.files["text"]
    assert prefix == tmp_path / "deep" / "ds_text_document"
    for ending, digest in RECORDED.items():
        assert hashlib.sha256(prefix.with_name(prefix.name + ending).read_bytes()).hexdigest() == digest
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["ds_text_document.bin", "ds_text_document.idx"]


def test_documents_without_eod_and_many_small_ones(tmp_path: Path) -> None:
    source = TextSource(TokenizerSource(TokenizerKind.CHAR_LEVEL), append_eod=False, stream="body")
    texts = [f"document {number}" for number in range(1000)]
    written = write(iter(texts), source, tmp_path / "ds", workers=2)
    dataset = IndexedDataset(str(written.files["body"]))
    assert [bytes(dataset.get(index).astype("u1")).decode() for index in range(len(dataset))] == texts


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_nothing(tmp_path: Path, workers: int) -> None:
    def texts() -> Iterator[str]:
        yield from ["good"] * 300
        raise DataError("the input broke")

    with pytest.raises(DataError, match="the input broke"):
        write(texts(), SOURCE, tmp_path / "ds", workers=workers)
    with pytest.raises(DataError, match="no record gave a document"):
        write(["", ""], SOURCE, tmp_path / "ds", workers=workers)
    assert list(tmp_path.iterdir()) == []
