# SPDX-License-Identifier: Apache-2.0
"""Words and sentences of a text by simple rules, without models, and hashes of runs of words.

Languages written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give one word per character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+(?:['\u2019-][^\W{SPACELESS}]+)*|[^\w\s]+")
PLAIN_WORD = re.compile(rf"[{SPACELESS}]|[^\W_{SPACELESS}]+")
SENTENCE_END = re.compile(r"[.!?\u2026][\"')\]\u2019\u201d]*\s+|[\u3002\uff01\uff1f][\u300d\u300f\u201d]*\s*|\n+")
STEP = 0x9E3779B97F4A7C15
"""Odd, as a multiplier modulo 2**64 must be to lose nothing."""


def split_words(text: str) -> list[str]:
    """Words, and runs of marks between them.

    >>> split_words("It's well-known -- isn't it?")
    ["It's", 'well-known', '--', "isn't", 'it', '?']
    """
    return WORD.findall(text)


def plain_words(text: str) -> list[str]:
    """Words for comparing: lower case, without marks.

    >>> plain_words("It's 3 o'clock!")
    ['it', 's', '3', 'o', 'clock']
    """
    return PLAIN_WORD.findall(text.lower())


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every sentence: a sentence ends after . ! ? and a space, or at a line's end. Abbreviations end one, too.

    >>> [(a, b) for a, b in sentence_spans("One. Two!  Three")]
    [(0, 4), (5, 9), (11, 16)]
    """
    start = 0
    for found in SENTENCE_END.finditer(text):
        end = found.start() + len(found.group().rstrip())
        if text[start:end].strip():
            yield start, end
        start = found.end()
    if text[start:].strip():
        yield start, len(text)


def hash_words(words: Sequence[str]) -> NDArray[np.uint64]:
    """One number per word."""
    known = {word: xxhash.xxh64_intdigest(word.encode()) for word in set(words)}
    return np.array([known[word] for word in words], dtype=np.uint64)


def hash_runs(hashed: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """One number for each run of `size` neighbouring words of `hash_words`; none where there are fewer words.

    >>> ab, bc, ca, ab_again, ba = hash_runs(hash_words("a b c a b a".split()), 2)
    >>> bool(ab == ab_again), len({ab, bc, ca, ba})
    (True, 4)
    """
    count = len(hashed) - size + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        total = total * np.uint64(STEP) + hashed[offset : offset + count]
    return _mixed(total)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Breaks the linear bond between neighbouring runs (the last step of splitmix64, Steele et al., 10.1145/2660193.2660195)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
