# SPDX-License-Identifier: Apache-2.0
"""The families that need no `tokenizers` library: SentencePiece, tiktoken and plain bytes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron.errors import BackendError, DataError
from megatron.tokenizer.tokenizer import Tokenizer, TokenizerKind, digest_of, existing, require_encodable

EOD_PIECE = "<|endoftext|>"


class SPMTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson, arXiv 1808.06226).

    A piece `<|endoftext|>` ends documents where the model has one (it was put there for that), else `</s>`.
    """

    name = TokenizerKind.SPM.value

    def __init__(self, vocab_file: str | None) -> None:
        path = existing(vocab_file, "vocab_file", kind=self.name, fix="give a SentencePiece .model file")
        self._model = _sentencepiece(path)
        self.vocab_size = int(self._model.get_piece_size())
        eod = self._model.piece_to_id(EOD_PIECE)
        if eod == self._model.unk_id() or eod < 0:
            eod = self._model.eos_id()
        if eod < 0:
            raise DataError(
                f"{path}: the model has neither a piece {EOD_PIECE} nor an end-of-sentence piece",
                where="vocab_file",
                fix="train it with user_defined_symbols=<|endoftext|> or eos_id >= 0",
            )
        self.eod = int(eod)
        self.pad, self.bos = (number if number >= 0 else None for number in (self._model.pad_id(), self._model.bos_id()))
        self.digest = digest_of(path)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order."""
        require_encodable(texts)
        return [[int(number) for number in self._model.encode(text)] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; ids beyond the vocabulary (padding rows of the embedding) give nothing."""
        return str(self._model.decode([number for number in ids if number < self.vocab_size]))


class TiktokenTokenizer(Tokenizer):
    """A named tiktoken encoding, `vocab_file: cl100k_base`. Special-token text inside a document stays text."""

    name = TokenizerKind.TIKTOKEN.value

    def __init__(self, vocab_file: str | None) -> None:
        if vocab_file is None:
            raise DataError(
                "TiktokenTokenizer needs `vocab_file`: the name of an encoding",
                where="vocab_file",
                fix="for example cl100k_base or o200k_base",
            )
        self._encoding = _tiktoken(vocab_file)
        self.vocab_size = int(self._encoding.n_vocab)
        self.eod = int(self._encoding.eot_token)
        self.pad = self.bos = None
        self.digest = digest_of(f"tiktoken:{vocab_file}:{self.vocab_size}")

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return list(self._encoding.encode_ordinary(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order."""
        return [list(ids) for ids in self._encoding.encode_ordinary_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; ids without a token (gaps and padding rows) give nothing."""
        known = []
        for number in ids:
            try:
                known.append(self._encoding.decode_single_token_bytes(number))
            except KeyError:
                continue
        return b"".join(known).decode("utf-8", errors="replace")


class CharLevelTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255 of a vocabulary of 512. FORMAT: 0 ends a document, 1 pads, as in the reference;
    these two control bytes do not occur in text worth training on and are dropped from it."""

    name = TokenizerKind.CHAR_LEVEL.value
    vocab_size = 512
    eod = 0
    pad = 1
    bos = None
    digest = digest_of("bytes:512")

    def encode(self, text: str) -> list[int]:
        """Bytes of one text."""
        return [byte for byte in text.encode("utf-8", errors="replace") if byte > 1]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes; eod, pad and ids above 255 give nothing."""
        return bytes(number for number in ids if 1 < number < 256).decode("utf-8", errors="replace")


def _library(name: str, kind: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendError(f"{kind} needs the package {name}", where="tokenizer_type", fix=f"uv pip install {name}") from error


def _sentencepiece(path: Path) -> Any:
    library = _library("sentencepiece", "SPMTokenizer")
    try:
        return library.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a SentencePiece model: {error}", where="vocab_file", fix="give the .model file, not .vocab"
        ) from error


def _tiktoken(name: str) -> Any:
    library = _library("tiktoken", "TiktokenTokenizer")
    known = library.list_encoding_names()
    if name not in known:
        raise DataError(f"tiktoken has no encoding {name!r}", where="vocab_file", fix=f"one of {', '.join(sorted(known))}")
    try:
        return library.get_encoding(name)
    except Exception as error:  # the download goes through requests, which may be absent or fail in many ways
        raise DataError(
            f"the encoding {name} could not be fetched: {type(error).__name__}",
            where="vocab_file",
            fix="offline, put the encoding's file into a folder named by TIKTOKEN_CACHE_DIR, or use HFTokenizer with a tokenizer.json",
        ) from error
