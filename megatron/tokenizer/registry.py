# SPDX-License-Identifier: Apache-2.0
"""From a TokenizerSource to an open tokenizer: its family, which library runs it (gigatoken where it gives the ids of `tokenizers`), and
how many threads that uses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megatron.errors import BackendError, DataError
from megatron.tokenizer.gigatoken_backend import HF_INSTEAD, GigatokenTokenizer, engine_of
from megatron.tokenizer.hugging_face import EngineTokenizer, open_gpt2_bpe, open_hf, open_hf_gpt2
from megatron.tokenizer.others import CharLevelTokenizer, SPMTokenizer, TiktokenTokenizer
from megatron.tokenizer.tokenizer import Tokenizer, TokenizerBackend, TokenizerKind, TokenizerSource, encodable

OPENERS: dict[TokenizerKind, Callable[[str | None], Tokenizer]] = {
    TokenizerKind.HF: open_hf,
    TokenizerKind.HF_GPT2: open_hf_gpt2,
    TokenizerKind.SPM: SPMTokenizer,
    TokenizerKind.TIKTOKEN: TiktokenTokenizer,
}


def open_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Open the tokenizer. Raises DataError or BackendError that name the key at fault."""
    if source.backend is TokenizerBackend.AUTO:
        raise ValueError("the backend `auto` has to be settled before a tokenizer is opened: select_backend(source, texts)")
    family = open_family(source)
    return family if source.backend is TokenizerBackend.HF else GigatokenTokenizer(engine_of(family))


def open_family(source: TokenizerSource) -> Tokenizer:
    """The tokenizer, run by its family's own library."""
    if source.kind is TokenizerKind.GPT2_BPE:
        return open_gpt2_bpe(source.vocab_file, source.merge_file)
    return CharLevelTokenizer() if source.kind is TokenizerKind.CHAR_LEVEL else OPENERS[source.kind](source.vocab_file)


def set_library_threads(number: int) -> None:
    """Threads of `tokenizers` and gigatoken in this process and those it starts.

    Both read the environment when they are first used, once: call this before. A process started by multiprocessing uses gigatoken on
    one thread whatever the number, so work is divided over processes, not threads.
    """
    os.environ["RAYON_NUM_THREADS"] = str(number)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if number > 1 else "false"


# What tells tokenizers apart: white space, long runs, and in the file Unicode forms, scripts, rare planes, control characters,
# contractions, code.
HARD_STRINGS = (
    *(" " * n for n in (1, 2, 3, 4, 5, 24, 25, 100)),
    *("\t" * n for n in (1, 2, 7)),
    *("\n" * n for n in (1, 2, 3, 9)),
    *("a" * 3000, "ab" * 4000, "na\u00efve" * 500, "\u4f60" * 1000, "\U0001f600" * 500, "-" * 1000 + "=" * 1000, "1" * 3000),
    *json.loads(Path(__file__).with_name("hard_strings.json").read_text(encoding="ascii")),
)


class Settled(NamedTuple):
    """A source whose backend is no longer `auto`, why it is that one, and the tokenizer, which is open by then."""

    source: TokenizerSource
    reason: str
    tokenizer: Tokenizer


def select_backend(source: TokenizerSource, texts: Sequence[str] = ()) -> Settled:
    """Decide what runs the tokenizer, by its ids on the hard strings and on `texts`, the first ones of the run.

    auto: gigatoken if it is there, supports the tokenizer and gives the same ids, else hf. gigatoken asked for by name: BackendError
    or DataError if it cannot be had. Texts that are not Unicode are left out: they fail with every library.
    """
    tokenizer = open_family(source)
    if source.backend is TokenizerBackend.HF:
        return Settled(source, "asked for", tokenizer)
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
        return Settled(replace(source, backend=TokenizerBackend.HF), error.what, tokenizer)
    reason = f"the ids of {len(checked)} texts equal those of tokenizers"
    return Settled(replace(source, backend=TokenizerBackend.GIGATOKEN), reason, fast)


def hard_strings(tokenizer: EngineTokenizer) -> list[str]:
    """The standing set, and every added token of this tokenizer inside text, at its borders, doubled and between spaces."""
    tokens = tokenizer.tokens()
    around = [
        form.format(token) for token in tokens for form in ("{0}", "a{0}b", "a {0} b", " {0}", "{0} ", "\n{0}\n", "1{0}{0}2", "x  {0}  y")
    ]
    return [*HARD_STRINGS, *around, "".join(tokens), " ".join(tokens), *(token[:-1] for token in tokens)]
