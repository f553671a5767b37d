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
from megatron.data.hf.stage_cache import files_are_whole
from megatron.data.indexed_dataset import data_file, index_file
from megatron.data.preprocess.blocks import first_texts, texts
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
    train_size = _train_size(corpus, request)
    source = _source(request, folder, trained=train_size is not None)
    asked = {
        "corpus": corpus.name,
        "tokenizer_type": source.kind.value,
        "vocab_file": source.vocab_file,
        "merge_file": source.merge_file,
        "trained_vocab_size": train_size,
        "python": platform.python_version() if corpus.local else None,
    }
    if not request.again and (done := _read_record(record, asked)) is not None:
        return PreparedCorpus(stream_prefix(prefix, "text"), source, done["documents"], done["tokens"], False, time.monotonic() - start)
    record.unlink(missing_ok=True)
    log.info("%s: %s", corpus.name, corpus.about)
    documents = corpus.source(folder, again=request.again)
    if train_size is not None:
        log.info("training a BPE tokenizer with %d ids on %s", train_size, corpus.name)
        save_tokenizer(train_bpe(texts(documents), vocab_size=train_size), folder / "tokenizer.json")
    log.info("tokenising %s with %s", corpus.name, source.kind.value)
    chosen = choose(replace(source, backend=TokenizerBackend.AUTO), first_texts(documents, ("text",)), workers=request.workers)
    options = Options(workers=request.workers, about={"corpus": corpus.name, "about": corpus.about, "tokenizer": chosen.about})
    texts_source = TextSource(chosen.source)
    encoder = texts_source.open(chosen.tokenizer) if chosen.tokenizer else None
    written = write(documents, texts_source, prefix, options, encoder=encoder)
    facts = {"documents": written.documents["text"], "tokens": written.tokens["text"], "tokenizer_digest": open_tokenizer(source).digest}
    sizes = {file.name: file.stat().st_size for file in (data_file(written.files["text"]), index_file(written.files["text"]))}
    write_durably(record, json.dumps({"asked": asked, **facts, "files": sizes}, indent=1) + "\n")
    return PreparedCorpus(written.files["text"], source, written.documents["text"], written.tokens["text"], True, time.monotonic() - start)


def _train_size(corpus: Corpus, request: CorpusRequest) -> int | None:
    """Size of the tokenizer that is trained on the corpus; None where another one is used."""
    own = request.vocab_file is None and request.tokenizer_type in (None, TokenizerKind.HF)
    return request.vocab_size or corpus.vocab_size if own else None


def _source(request: CorpusRequest, folder: Path, *, trained: bool) -> TokenizerSource:
    if trained:
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


def _read_record(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier call that asked for the same and whose files are whole, else None."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if record.get("asked") != asked or not files_are_whole(path.parent, record["files"]):
        return None
    absent = asked["trained_vocab_size"] is not None and not Path(asked["vocab_file"]).exists()
    return None if absent else record
