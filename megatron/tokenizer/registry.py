# SPDX-License-Identifier: Apache-2.0
"""From a TokenizerSource to an open tokenizer: its family, which library runs it (gigatoken where it gives the ids of `tokenizers`), and
how many threads that uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron.errors import BackendError, DataError
from megatron.tokenizer.gigatoken_backend import HF_INSTEAD, GigatokenTokenizer, engine_of
from megatron.tokenizer.hugging_face import EngineTokenizer, open_gpt2_bpe, open_hf, open_hf_gpt2
from megatron.tokenizer.others import CharLevelTokenizer, SPMTokenizer, TiktokenTokenizer
from megatron.tokenizer.tokenizer import Tokenizer, TokenizerBackend, TokenizerKind, TokenizerSource, encodable


def open_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Open the tokenizer. Raises DataError or BackendError that name the key at fault."""
    if source.backend is TokenizerBackend.AUTO:
        raise ValueError("the backend `auto` has to be settled before a tokenizer is opened: select_backend(source, texts)")
    family = open_family(source)
    return family if source.backend is TokenizerBackend.HF else GigatokenTokenizer(engine_of(family))


def open_family(source: TokenizerSource) -> Tokenizer:
    """The tokenizer, run by its family's own library."""
    if source.kind is TokenizerKind.HF:
        return open_hf(source.vocab_file)
    if source.kind is TokenizerKind.GPT2_BPE:
        return open_gpt2_bpe(source.vocab_file, source.merge_file)
    if source.kind is TokenizerKind.HF_GPT2:
        return open_hf_gpt2(source.vocab_file)
    if source.kind is TokenizerKind.SPM:
        return SPMTokenizer(source.vocab_file)
    if source.kind is TokenizerKind.TIKTOKEN:
        return TiktokenTokenizer(source.vocab_file)
    return CharLevelTokenizer()


def set_library_threads(number: int) -> None:
    """Threads of `tokenizers` and gigatoken in this process and those it starts.

    Both read the environment when they are first used, once: call this before. A process started by multiprocessing uses gigatoken on
    one thread whatever the number, so work is divided over processes, not threads.
    """
    os.environ["RAYON_NUM_THREADS"] = str(number)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if number > 1 else "false"


HARD_STRINGS = (
    "",
    *(" " * n for n in (1, 2, 3, 4, 5, 24, 25, 100)),
    *("\t" * n for n in (1, 2, 7)),
    *("\n" * n for n in (1, 2, 3, 9)),
    " \n \n  \n",
    "\t \t  \t",
    "   lead",
    "trail   ",
    "a  b   c    d",
    "line\r\nline\r\n\r\nline\r",
    "\r",
    "\r\n",
    "\n \r \t\v\f\x1c\x1d\x1e\x1f\x85",
    "x\u00a0\u00a0 y \u2003 z\u3000\u3000w",
    "\u2028a\u2029 b\u2028\u2028",
    "\ufeffBOM first, \ufeff and inside",
    "\u200b\u200c\u200d\u2060\u00ad",
    # Composed and decomposed forms, marks in both orders, and what has no composed form.
    "caf\u00e9 cafe\u0301 \u00c5 A\u030a \u212b",
    "\u1e9b\u0323 \u0344 \u2126 \u0958 \u0f73 \ufb1d \U0001d15e",
    "a\u0323\u0307 a\u0307\u0323 e\u0301\u0328\u0323",
    "\u0301first \u0301",
    "z\u0300\u0301\u0302\u0303\u0304\u0305\u0306",
    "\uac01 \u1100\u1161\u11a8 \u1100\u1161 \u11a8",
    "\u1ec7 e\u0323\u0302 e\u0302\u0323",
    "\ufb01 \u2460 \u00b2 \u00bd \u2167 \uff21\uff11",
    "\u0130i\u0307 \u01c5 \u00df \u1e9e \u017f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f 1\ufe0f\u20e3",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u200f\u202eabc\u202c",
    "\u4f60\u597d\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\uff01\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u304b\u3099 \u304c \uff76\uff9e",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0b95\u0bcd\u0bb7 \u17a0\u17d2\u179c",
    "\U00020000\U0002f800 \U0001f600 \U0001d400 \U00010348 \U000e0001 \U000f0000\U0010fffd \ufffe\uffff",
    "\x00",
    "a\x00b \x00\x00",
    "\x01\x02\x07\x08\x1b[0m\x7f\x80\x9f",
    "\ufffd \ufffd\ufffd",
    "a" * 3000,
    "ab" * 4000,
    "na\u00efve" * 500,
    "\u4f60" * 1000,
    "\U0001f600" * 500,
    "-" * 1000 + "=" * 1000,
    "1" * 3000,
    "3.14159 1,234,567 0x1F 1e-9 12345678901234567890 \u0661\u0662\u0663 \u0967\u0968\u0969\u096a \u00b2\u00b3",
    "abc\u0434\u0435\u03b3\u03b4\u4e2d\u6587\u05d0\u05d1 mixed\u0441\u043b\u043e\u0432\u043e123\u6570",
    "I'm you're we've he'd she'll it's don't I'M YOU'RE WE'VE HE'D SHE'LL IT'S DON'T",
    "'s 't 're 've 'm 'll 'd ''s ' s 'x'S \u2019s l\u2019\u00e9t\u00e9 '\u017f \u02bcn",
    "https://user@example.org:8080/a/b_c-d?x=1&y=%20+z#frag mail@example.org C:\\dir\\file.txt",
    "def f(x, *, y=None) -> int:\n\treturn x**2  # \u00e9\n\n\n    if a[0] != b['k']:\n        pass\n",
    '<html><body class="a">&amp; &#39;</body></html> {"k": [1, 2.5e-3, null]} $x_1^{2}$ \\frac{a}{b}',
    "<s> </s> <unk> <pad> <0x0A> <|endoftext|> <|im_start|> [CLS] [MASK] \u2581 \u2581\u2581a \u0120 \u010a",
    "end. Next!? (a) [b] {c} -- ... ;:,. __init__ snake_case camelCase HTTPServer v1.2.3",
    "a \u0305b\u200d c\u0301d \u20d0",
)
"""What tells tokenizers apart: white space, Unicode forms, scripts, rare planes, control characters, long runs, contractions, code."""


class Settled(NamedTuple):
    """A source whose backend is no longer `auto`, and why it is that one."""

    source: TokenizerSource
    reason: str


def select_backend(source: TokenizerSource, texts: Sequence[str] = ()) -> Settled:
    """Decide what runs the tokenizer, by its ids on the hard strings and on `texts`, the first ones of the run.

    auto: gigatoken if it is there, supports the tokenizer and gives the same ids, else hf. gigatoken asked for by name: BackendError
    or DataError if it cannot be had. Texts that are not Unicode are left out: they fail with every library.
    """
    return settle_open(source, texts)[0]


def settle_open(source: TokenizerSource, texts: Sequence[str] = ()) -> tuple[Settled, Tokenizer]:
    """As `select_backend`, with the tokenizer, which is open by then."""
    tokenizer = open_family(source)
    if source.backend is TokenizerBackend.HF:
        return Settled(source, "asked for"), tokenizer
    try:
        engine = engine_of(tokenizer)
        fast = GigatokenTokenizer(engine)
        checked = [*hard_strings(engine), *filter(encodable, texts)]
        difference = fast.difference(checked)
        if difference is not None:
            raise DataError(f"gigatoken differs: {difference}", where="--tokenizer-backend", fix=HF_INSTEAD)
    except (BackendError, DataError) as error:
        if source.backend is TokenizerBackend.GIGATOKEN:
            raise
        return Settled(replace(source, backend=TokenizerBackend.HF), error.what), tokenizer
    reason = f"the ids of {len(checked)} texts equal those of tokenizers"
    return Settled(replace(source, backend=TokenizerBackend.GIGATOKEN), reason), fast


def hard_strings(tokenizer: EngineTokenizer) -> list[str]:
    """The standing set, and every added token of this tokenizer inside text, at its borders, doubled and between spaces."""
    tokens = tokenizer.tokens()
    around = [
        form.format(token) for token in tokens for form in ("{0}", "a{0}b", "a {0} b", " {0}", "{0} ", "\n{0}\n", "1{0}{0}2", "x  {0}  y")
    ]
    return [*HARD_STRINGS, *around, "".join(tokens), " ".join(tokens), *(token[:-1] for token in tokens)]
