# SPDX-License-Identifier: Apache-2.0
"""The ids of `tokenizers` from gigatoken, many times faster, checked while it works. The one file that imports gigatoken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.errors import BackendError, DataError
from megatron.tokenizer.hugging_face import EngineTokenizer
from megatron.tokenizer.tokenizer import RaggedIds, Tokenizer, UnencodableText, spans

# Characters given to the library at once; below this its threads gain nothing, above it memory grows.
AT_A_TIME = 2**23
# Characters re-encoded with `tokenizers`: some at the start, then this share. `tokenizers` costs about 30 times as much for the
# same text, so that a share of 1/4000 is 1 % of the time.
FREE_CHARACTERS = 2**15
CHECKED_SHARE = 1 / 4000
# Characters after which a new library object is made: it keeps every distinct word for ever.
RENEWED_AFTER = 12_000_000
HF_INSTEAD = "use the backend hf: --tokenizer-backend hf"

# Characters that only one of the libraries knows, their tables being of different editions of Unicode: letters, marks and symbols of
# Unicode 17, and combining marks since Unicode 9 (their order, under NFC). Found by trying every character in the contexts of the
# test that guards this list; texts with one of them are few, and left to `tokenizers`.
NEWER_RANGES = """
    07FD 088F 0897-089F 08CA-08D3 09FE 0C3C 0C5C 0CDC 0D3B-0D3C 0EBA 1715 1ABF-1AEB 1DF6-1DFA 20C1 2B96 A7CE-A7D4 A7F1 A82C
    FBC3-FBD2 FD90-FD91 FDC8-FDCE 10940-10959 10D24-10D27 10D69-10D6D 10EAB-10EAC 10EC5-10EC7 10ED0-10ED8 10EFA-10EFF
    10F46-10F50 10F82-10F85 11070 1133B 113C2 113CE-113D0 1145E 11839-1183A 1193D-11943 119E0 11A34 11A47 11A99 11B60-11B67
    11D42-11D45 11D97 11DB0-11DE9 11F41-11F42 1611E 1612F 16D67 16EA0-16ED3 16FF0-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2
    1CCFA-1CCFC 1CEBA-1CEF0 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1E6C0-1E6F5 1E6FE-1E6FF 1F6D8
    1F777-1F77A 1F8D0-1F8D8 1FA54-1FA57 1FA8A 1FA8E 1FAC8 1FACD 1FAEA 1FAEF 1FBFA 2B73A-2B73F 2CEA2-2CEAD 323B0-33479
"""


class IdMismatch(NamedTuple):
    """A text of which the two libraries make different ids."""

    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        i = next((i for i, (a, b) in enumerate(zip(self.expected, self.found, strict=False)) if a != b), 0)
        at, text = slice(max(i - 4, 0), i + 12), repr(self.text)
        text = text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"
        return (
            f"of {text} `tokenizers` makes {len(self.expected)} ids, from number {at.start} on {self.expected[at]}, "
            f"and gigatoken {len(self.found)}, {self.found[at]}"
        )


class GigatokenTokenizer(Tokenizer):
    """An EngineTokenizer whose batches gigatoken encodes.

    A small share of the texts is encoded by both libraries; the first difference ends the run. Raises BackendError where gigatoken
    is missing, DataError where it cannot run the tokenizer.
    """

    def __init__(self, engine: EngineTokenizer) -> None:
        self._engine = engine
        self._library = _load(engine)
        self._encoded = 0
        self._before, self._behind = (np.array(ids, dtype=np.uint32) for ids in engine.affixes())
        self._newer = newer_characters()
        self._calls = 0
        self._credit = float(FREE_CHARACTERS)
        self._wanted = 0
        self.name, self.vocab_size, self.digest = engine.name, engine.vocab_size, engine.digest
        self.eod, self.pad, self.bos = engine.eod, engine.pad, engine.bos

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self._engine.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order."""
        return [part.tolist() for part in _parts(self.encode_ragged(texts))]

    def encode_ragged(self, texts: Sequence[str]) -> RaggedIds:
        """Ids of several texts, in one array."""
        result = self._with_newer(texts)
        self._check_one(texts, result)
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, by `tokenizers`."""
        return self._engine.decode(ids)

    def difference(self, texts: Sequence[str]) -> IdMismatch | None:
        """The first of the texts of which the libraries make different ids."""
        expected, found = self._engine.encode_ragged(texts), self._with_newer(texts)
        if np.array_equal(expected.sizes, found.sizes) and np.array_equal(expected.ids, found.ids):
            return None
        for text, right, wrong in zip(texts, _parts(expected), _parts(found), strict=True):
            if not np.array_equal(right, wrong):
                return IdMismatch(text, right.tolist(), wrong.tolist())
        return None

    def _with_newer(self, texts: Sequence[str]) -> RaggedIds:
        """gigatoken's ids, and those of `tokenizers` for texts with characters that the two are known to class differently."""
        newer = [i for i, text in enumerate(texts) if not text.isascii() and self._has_newer(i, text)]
        if not newer:
            return self._encode(texts)
        apart = set(newer)
        exact = iter(_parts(self._engine.encode_ragged([texts[i] for i in newer])))
        fast = iter(_parts(self._encode([text for i, text in enumerate(texts) if i not in apart])))
        parts = [next(exact if i in apart else fast) for i in range(len(texts))]
        return RaggedIds(np.concatenate(parts), np.fromiter(map(len, parts), dtype=np.int32, count=len(parts)))

    def _has_newer(self, number: int, text: str) -> bool:
        # A table is several times faster than a regular expression of ranges.
        try:
            return bool(self._newer[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].any())
        except UnicodeEncodeError:
            raise UnencodableText(number, text) from None

    def _encode(self, texts: Sequence[str]) -> RaggedIds:
        # In a forked process the library must not touch the threads of its parent; None is its own check for that.
        parallel = False if os.environ.get("RAYON_NUM_THREADS") == "1" else None
        ids, sizes = [np.zeros(0, np.uint32)], [np.zeros(0, np.int32)]
        for first, last in spans(texts, AT_A_TIME):
            if self._encoded > RENEWED_AFTER:
                self._library, self._encoded = _load(self._engine), 0
            self._encoded += sum(map(len, texts[first:last]))
            rows = self._library.encode_batch(list(texts[first:last]), parallel=parallel).layout
            ends = np.asarray(rows.offsets.data)
            ids.append(np.asarray(rows.content.data)[ends[0] : ends[-1]])
            sizes.append(np.diff(ends).astype(np.int32))
        one = RaggedIds(ids[1], sizes[1]) if len(ids) == 2 else RaggedIds(np.concatenate(ids), np.concatenate(sizes))
        return self._surrounded(one) if self._before.size or self._behind.size else one

    def _surrounded(self, bare: RaggedIds) -> RaggedIds:
        """With what the post-processor adds around each text; gigatoken leaves that to its callers."""
        number = len(bare.sizes)
        # Behind first: at a border between two texts, what ends the one comes before what begins the next.
        ends = np.repeat(np.cumsum(bare.sizes, dtype=np.int64), self._behind.size)
        ids = np.insert(bare.ids, ends, np.tile(self._behind, number))
        sizes = bare.sizes + np.int32(self._behind.size)
        begins = np.repeat(np.cumsum(sizes, dtype=np.int64) - sizes, self._before.size)
        return RaggedIds(np.insert(ids, begins, np.tile(self._before, number)), sizes + np.int32(self._before.size))

    def _check_one(self, texts: Sequence[str], result: RaggedIds) -> None:
        """Encode one of the texts with `tokenizers` too, if enough has been encoded since the last one."""
        if not texts:
            return
        self._credit += CHECKED_SHARE * sum(map(len, texts))
        # Any text of a call is taken, from wherever it stands, and the same ones in every run.
        first = self._calls * 7919 % len(texts)
        self._calls += 1
        if self._credit < self._wanted:
            return
        # A book would use up the checks of all that follows: it is passed over, unless there are only such.
        turn = [*range(first, len(texts)), *range(first)]
        i = next((i for i in turn if len(texts[i]) <= FREE_CHARACTERS), None)
        if i is None:
            i = min(turn, key=lambda i: len(texts[i]))
        # A text longer than the credit is saved up for: otherwise only short ones would ever be checked.
        self._wanted = len(texts[i])
        if self._credit < self._wanted:
            return
        self._credit -= self._wanted
        self._wanted = 0
        begin = int(result.sizes[:i].sum(dtype=np.int64))
        found = result.ids[begin : begin + result.sizes[i]].tolist()
        expected = self._engine.encode(texts[i])
        if found != expected:
            raise DataError(f"the tokenizer backends differ: {IdMismatch(texts[i], expected, found)}", fix=HF_INSTEAD)


def engine_of(tokenizer: Tokenizer) -> EngineTokenizer:
    """The tokenizer as one of those that gigatoken may be able to run; DataError for the other families."""
    if not isinstance(tokenizer, EngineTokenizer):
        raise DataError(f"gigatoken cannot run a {tokenizer.name}", where="tokenizer_type", fix=HF_INSTEAD)
    return tokenizer


def _load(engine: EngineTokenizer) -> Any:
    if find_spec("gigatoken") is None:
        raise BackendError("the package gigatoken is not installed", where="--tokenizer-backend", fix="uv pip install gigatoken, or hf")
    # The library takes no notice of this flag, and a word that shows it may not be among the hard strings.
    if whole := engine.whole_words():
        raise DataError(
            f"gigatoken cannot run this tokenizer: {whole[0]!r} is a token only as a whole word", where="vocab_file", fix=HF_INSTEAD
        )
    try:
        import gigatoken

        return gigatoken.Tokenizer.from_json(engine.content())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what panics in Rust is no Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"gigatoken cannot run this tokenizer: {reason}", where="vocab_file", fix=HF_INSTEAD) from error


def newer_characters() -> NDArray[np.bool_]:
    """[code points], whether in NEWER_RANGES."""
    newer = np.zeros(0x110000, dtype=bool)
    for word in NEWER_RANGES.split():
        first, last = word.partition("-")[::2]
        newer[int(first, 16) : int(last or first, 16) + 1] = True
    return newer


def _parts(ragged: RaggedIds) -> list[NDArray[np.uint32]]:
    return np.split(ragged.ids, np.cumsum(ragged.sizes, dtype=np.int64)[:-1]) if len(ragged.sizes) else []
