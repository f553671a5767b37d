# SPDX-License-Identifier: Apache-2.0
"""gigatoken's ids against those of `tokenizers`: kinds of tokenizers, any Unicode text, checks while running."""

from __future__ import annotations

import multiprocessing
from functools import cache
from typing import Any

import awkward  # noqa: F401 - gigatoken imports it at its first batch: done once here, not in each test's process
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import DataError
from megatron.tokenizer import Tokenizer, TokenizerKind
from megatron.tokenizer.gigatoken_backend import AT_A_TIME, CHECKED_SHARE, FREE_CHARACTERS, GigatokenTokenizer, newer_characters
from megatron.tokenizer.hugging_face import EngineTokenizer
from megatron.tokenizer.registry import hard_strings
from megatron.tokenizer.tokenizer import UnencodableText
from tests.support.engines import SUPPORTED, corpus

# What the standard says nothing of: half of a surrogate pair is no character.
CHARACTERS = st.characters(exclude_categories=["Cs"])
AWKWARD = st.sampled_from(list(" \t\n\r'sS.19aZ-<|>_\u0301\u0323\u00e9\u2581\u4f60\u200d") + ["<|endoftext|>", "  ", "\r\n", "'ll"])
NOT_NEWER = ~newer_characters()


@cache
def engine(kind: str) -> EngineTokenizer:
    return EngineTokenizer(SUPPORTED[kind](), kind=TokenizerKind.HF, eod=0, pad=1, bos=None, digest="d")


@pytest.mark.parametrize("kind", SUPPORTED)
def test_ids_equal_those_of_tokenizers(kind: str) -> None:
    trusted, fast = engine(kind), GigatokenTokenizer(engine(kind))
    assert isinstance(fast, Tokenizer)
    texts = [*hard_strings(trusted), *corpus()]
    expected = trusted.encode_batch(texts)
    ids, sizes = fast.encode_ragged(texts)
    assert (ids.dtype, sizes.dtype) == (np.uint32, np.int32)
    assert sizes.tolist() == [len(some) for some in expected] and ids.tolist() == sum(expected, [])
    assert fast.encode_batch(texts) == expected and fast.encode_batch([]) == []
    assert fast.encode(texts[40]) == expected[40] and fast.decode(expected[40]) == trusted.decode(expected[40])
    names = ("name", "vocab_size", "eod", "pad", "bos", "digest")
    assert all(getattr(fast, name) == getattr(trusted, name) for name in names)
    assert fast.difference(texts) is None


@pytest.mark.parametrize("kind", ["neox", "llama3", "llama2", "metaspace"])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.lists(st.one_of(AWKWARD, AWKWARD, CHARACTERS), max_size=30).map("".join), max_size=8))
def test_ids_equal_on_any_text(kind: str, texts: list[str]) -> None:
    assert fast_of(kind).difference(texts) is None


@cache
def fast_of(kind: str) -> GigatokenTokenizer:
    return GigatokenTokenizer(engine(kind))


def test_what_the_post_processor_adds() -> None:
    ids, sizes = GigatokenTokenizer(engine("bracketed")).encode_ragged(["", "hello", ""])
    assert sizes[0] == 4 and ids[:4].tolist() == [0, 1, 1, 0] and ids[4:6].tolist() == [0, 1] and ids[-4:].tolist() == [0, 1, 1, 0]
    assert engine("bracketed").affixes() == ([0, 1], [1, 0]) and engine("golden").affixes() == ([], [])


@pytest.mark.parametrize("kind", ["golden", "neox"])
def test_characters_newer_than_a_library_are_left_to_the_other(kind: str) -> None:
    fast = GigatokenTokenizer(engine(kind))
    # Alone, gigatoken orders these marks differently under NFC.
    texts = ["plain", "a\u0898\u0323 \u0301\u0898", "caf\u00e9", "", "\U00032000's", "\u00df"]
    assert fast.difference(texts) is None
    bare = fast._encode(texts[1:2]).ids.tolist()
    assert (bare != engine(kind).encode(texts[1])) == (kind == "neox"), "else the list of newer characters is no longer needed"


@pytest.mark.full
@pytest.mark.parametrize("kind", ["neox", "llama3", "deepseek"])
def test_every_other_character_is_the_same_to_both(kind: str) -> None:
    fast = GigatokenTokenizer(engine(kind))
    # Nothing of the planes left out is assigned by any edition; a few of each stand for them.
    tried = [*range(0x33500), *range(0x33500, 0x110000, 97), *range(0xE0000, 0xE0200)]
    known = [chr(i) for i in tried if NOT_NEWER[i] and not 0xD800 <= i < 0xE000]
    forms = (
        "{0}{0} {0}{0},{0}\n  {0},.\nA{0}a \u4e00{0}a; {0}a{0}\n\n{0}\r\n;1234{0}1234's{0}'s;"
        "a\u0301{0}\u0323b\u0323{0}\u0301;--{0}--  {0};\u1100{0}\u11a8\u0915{0}\u093c."
    )
    texts = ["".join(map(forms.format, known[i : i + 16])) for i in range(0, len(known), 16)]
    difference = fast.difference(texts)
    assert difference is None, difference


class Broken:
    """A library that changes one id of every text that holds `where`."""

    def __init__(self, library: Any, where: str) -> None:
        self._library = library
        self._where = where

    def encode_batch(self, texts: list[str], parallel: bool | None) -> Any:
        return self._library.encode_batch([text.replace(self._where, "?") for text in texts], parallel=parallel)


def broken(where: str) -> GigatokenTokenizer:
    fast = GigatokenTokenizer(engine("golden"))
    fast._library = Broken(fast._library, where)
    return fast


def test_a_difference_is_named() -> None:
    difference = broken("lo wor").difference(["fine", "hello world", "hello"])
    assert difference is not None and difference.text == "hello world"
    assert difference.expected == engine("golden").encode("hello world")
    assert difference.found == engine("golden").encode("hel?ld") and "'hello world'" in str(difference)


def test_a_difference_while_running_ends_the_run() -> None:
    with pytest.raises(DataError, match="backends differ: of 'bad text'.*\n.*fix.*hf"):
        broken("bad").encode_ragged(["bad text"])
    fast = broken("bad")
    # After the first texts only a share is looked at, and any text's turn comes.
    with pytest.raises(DataError, match="backends differ"):
        for _ in range(3000):
            fast.encode_ragged(["good " * 200] * 9 + ["bad " * 200])


def test_a_book_does_not_end_the_checks() -> None:
    fast = broken("bad")
    book = "good " * FREE_CHARACTERS
    with pytest.raises(DataError, match="backends differ: of 'a bad one'"):
        for _ in range(2):
            fast.encode_ragged([book, "a bad one", book])
    fast.encode_ragged(["bad " * FREE_CHARACTERS])  # longer than what is checked for free
    fast._credit = 5.0 * FREE_CHARACTERS
    with pytest.raises(DataError, match="backends differ"):
        fast.encode_ragged(["bad " * FREE_CHARACTERS, book])


def test_the_checks_cost_a_small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = 0
    encode = EngineTokenizer.encode

    def counted(self: EngineTokenizer, text: str) -> list[int]:
        nonlocal checked
        checked += len(text)
        return encode(self, text)

    monkeypatch.setattr(EngineTokenizer, "encode", counted)
    fast = GigatokenTokenizer(engine("golden"))
    texts = ["some words " * 20, "word " * 4000, "more " * 300, ""]
    calls = 400
    for _ in range(calls):
        fast.encode_ragged(texts)
    total = calls * sum(map(len, texts))
    assert 0.6 * FREE_CHARACTERS < checked <= FREE_CHARACTERS + CHECKED_SHARE * total


@pytest.mark.parametrize("kind", ["golden", "llama2"])
def test_half_a_surrogate_pair_is_named(kind: str) -> None:
    for tokenizer in (engine(kind), GigatokenTokenizer(engine(kind))):
        for call in (tokenizer.encode_ragged, tokenizer.encode_batch):
            with pytest.raises(UnencodableText, match="text 1 of the batch is not Unicode.*U\\+D83D, at character 3") as caught:
                call(["fine", "abc\ud83d", "\ud800"])
            assert caught.value.number == 1


def test_large_batches_are_cut_and_put_together() -> None:
    fast = GigatokenTokenizer(engine("bracketed"))
    texts = ["word " * 100] * (2 * AT_A_TIME // 500 + 10)
    ids, sizes = fast.encode_ragged(texts)
    one = fast.encode(texts[0])
    assert len(sizes) == len(texts) and (sizes == len(one)).all() and (ids.reshape(len(texts), -1) == one).all()


def test_a_forked_process_can_encode() -> None:
    fast = GigatokenTokenizer(engine("golden"))
    texts = ["word " * 1000] * 800
    here = fast.encode_ragged(texts)  # large enough for the library to start its threads, which a fork does not copy
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(int(fast.encode_ragged(texts).ids.sum(dtype=np.int64))))
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0 and queue.get() == here.ids.sum(dtype=np.int64)


def test_the_library_is_made_anew_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps every distinct word for ever; a new object forgets them, and gives the same ids."""
    from megatron.tokenizer import gigatoken_backend

    trusted, made, load = engine("golden"), [], gigatoken_backend._load
    monkeypatch.setattr(gigatoken_backend, "RENEWED_AFTER", 2000)
    monkeypatch.setattr(gigatoken_backend, "_load", lambda engine: made.append(engine) or load(engine))
    fast = GigatokenTokenizer(trusted)
    for text in corpus()[:40]:
        assert fast.encode_batch([text]) == trusted.encode_batch([text])
    assert len(made) > 3
