# SPDX-License-Identifier: Apache-2.0
"""From the name of a corpus to its tokenizer and `.bin/.idx`. A second call with the same request does nothing."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.atomic_io import write_durably
from megatron.data.hf.corpora import Corpus, find
from megatron.data.hf.download import Remote, fetch
from megatron.data.preprocess.blocks import RecordSource, first_texts, texts
from megatron.data.preprocess.encoders import TextSource
from megatron.data.preprocess.flags import choose
from megatron.data.preprocess.resumable_output import stream_prefix
from megatron.data.preprocess.writer import Options, write
from megatron.errors import DataError
from megatron.log import get_logger
from megatron.tokenizer import TokenizerBackend, TokenizerKind, TokenizerSource, open_tokenizer
from megatron.tokenizer.train import save_tokenizer, train_bpe

log = get_logger(__name__)

GPT2_FILES = (
    Remote(
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        "gpt2-vocab.json",
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    Remote(
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "gpt2-merges.txt",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
)


@dataclass(frozen=True, kw_only=True)
class CorpusRequest:
    """What to prepare.

    tokenizer_type: None = a tokenizer trained on the corpus where the registry says how, else GPT2BPETokenizer
    vocab_size:     of a tokenizer that is trained; None = the registry's
    """

    corpus: str
    data_dir: Path
    tokenizer_type: TokenizerKind | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    workers: int = 1
    again: bool = False


@dataclass(frozen=True)
class PreparedCorpus:
    """What is there now. prefix: of the .bin/.idx; fresh: False when it had been there before"""

    prefix: Path
    tokenizer: TokenizerSource
    documents: int
    tokens: int
    fresh: bool
    seconds: float


def prepare(request: CorpusRequest) -> PreparedCorpus:
    """Write `<data_dir>/<corpus>/<corpus>_text_document.bin/.idx`, and `tokenizer.json` where one is trained.

    Raises DataError for unknown corpora, failed downloads and missing tokenizer files.
    """
    start = time.monotonic()
    corpus = find(request.corpus)
    folder = request.data_dir / corpus.name
    prefix = folder / corpus.name
    record = folder / f"{corpus.name}_prepared.json"
    trained = _trains(corpus, request)
    source = _source(corpus, request, folder)
    asked = {
        "corpus": corpus.name,
        "tokenizer_type": source.kind.value,
        "vocab_file": source.vocab_file,
        "merge_file": source.merge_file,
        "trained_vocab_size": (request.vocab_size or corpus.vocab_size) if trained else None,
        "python": platform.python_version() if corpus.local else None,
    }
    if not request.again and (done := _read_record(record, asked)) is not None:
        return PreparedCorpus(stream_prefix(prefix, "text"), source, done["documents"], done["tokens"], False, time.monotonic() - start)
    record.unlink(missing_ok=True)
    log.info("%s: %s", corpus.name, corpus.about)
    documents = corpus.source(folder, again=request.again)
    if trained:
        _train(corpus, documents, request, folder)
    log.info("tokenising %s with %s", corpus.name, source.kind.value)
    chosen = choose(replace(source, backend=TokenizerBackend.AUTO), first_texts(documents, ("text",)), workers=request.workers)
    options = Options(workers=request.workers, about={"corpus": corpus.name, "about": corpus.about, "tokenizer": chosen.about})
    texts_source = TextSource(chosen.source)
    encoder = texts_source.open(chosen.tokenizer) if chosen.tokenizer else None
    written = write(documents, texts_source, prefix, options, encoder=encoder)
    facts = {"documents": written.documents["text"], "tokens": written.tokens["text"], "tokenizer_digest": open_tokenizer(source).digest}
    _write_record(record, {"asked": asked, **facts, "files": _sizes(written.files["text"])})
    return PreparedCorpus(written.files["text"], source, written.documents["text"], written.tokens["text"], True, time.monotonic() - start)


def _trains(corpus: Corpus, request: CorpusRequest) -> bool:
    return (
        request.vocab_file is None
        and request.tokenizer_type in (None, TokenizerKind.HF)
        and (request.vocab_size or corpus.vocab_size) is not None
    )


def _source(corpus: Corpus, request: CorpusRequest, folder: Path) -> TokenizerSource:
    if _trains(corpus, request):
        return TokenizerSource(TokenizerKind.HF, str(folder / "tokenizer.json"))
    kind = request.tokenizer_type or (TokenizerKind.HF if request.vocab_file and request.merge_file is None else TokenizerKind.GPT2_BPE)
    if kind is TokenizerKind.GPT2_BPE and request.vocab_file is None and request.merge_file is None:
        vocab, merges = (fetch(remote, request.data_dir) for remote in GPT2_FILES)
        return TokenizerSource(kind, str(vocab), str(merges))
    if kind is TokenizerKind.HF and request.vocab_file is None:
        raise DataError(
            "HFTokenizer needs a tokenizer", where="--vocab-file", fix="give a tokenizer.json, or --vocab-size to train one on the corpus"
        )
    return TokenizerSource(kind, request.vocab_file, request.merge_file)


def _train(corpus: Corpus, documents: RecordSource, request: CorpusRequest, folder: Path) -> None:
    size = request.vocab_size or corpus.vocab_size
    assert size is not None  # _trains
    log.info("training a BPE tokenizer with %d ids on %s", size, corpus.name)
    engine = train_bpe(texts(documents), vocab_size=size)
    save_tokenizer(engine, folder / "tokenizer.json")


def _sizes(prefix: Path) -> dict[str, int]:
    files = [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")]
    return {file.name: file.stat().st_size for file in files}


def _read_record(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier call that asked for the same and whose files are whole, else None."""
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    if record.get("asked") != dict(asked):
        return None
    for name, size in record["files"].items():
        file = path.parent / name
        if not file.exists() or file.stat().st_size != size:
            return None
    vocab_file = asked["vocab_file"]
    if vocab_file is not None and (asked["trained_vocab_size"] is not None) and not Path(vocab_file).exists():
        return None
    return record


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    write_durably(path, json.dumps(record, indent=1) + "\n")
