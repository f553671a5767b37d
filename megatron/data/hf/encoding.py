# SPDX-License-Identifier: Apache-2.0
"""Which encoder writes what was found, with which tokenizer and template. Knows no files of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.data.chat.masks import Masking
from megatron.data.chat.pairs import PairSource
from megatron.data.chat.sources import ChatFormat, ChatSource, chat_format
from megatron.data.hf.detect import Found, How
from megatron.data.hf.encoders import LimitedSource, ShapedSource
from megatron.data.hf.record_adapters import RecordAdapter
from megatron.data.hf.request import Tokens
from megatron.data.preprocess.blocks import FIRST_RECORDS, BlockStart, RecordSource
from megatron.data.preprocess.encoders import EncoderSource, TextSource
from megatron.data.preprocess.flags import choose
from megatron.errors import ConfigError
from megatron.tokenizer import TokenizerBackend, TokenizerKind, TokenizerSource, open_tokenizer

TEMPLATED = (How.TURNS, How.PAIRS, How.JUDGED, How.RENDERED)
"""What is written with a chat template, and ends where that ends it."""


@dataclass(frozen=True)
class Opened:
    """The tokenizer's files, here. ids: None where none is needed; template: of LABELLED and RENDERED"""

    ids: TokenizerSource | None
    template: ChatFormat | None

    @property
    def digest(self) -> str | None:
        """Of what the ids depend on."""
        return open_tokenizer(replace(self.ids, backend=TokenizerBackend.HF)).digest if self.ids else None


def open_tokens(request: Tokens, how: How, *, ids: bool, fetch: Callable[[str], str]) -> Opened:
    """Tokenizer and template as far as they are needed: `ids`, or templates. fetch: name on the Hub -> folder

    Raises ConfigError when one is needed and not given, or when the ids of one are wanted with the template of another.
    """
    templated = how in TEMPLATED
    if not ids and not templated:
        return Opened(None, None)
    name = request.tokenizer or request.template_of
    if name is None:
        raise ConfigError(
            "no tokenizer is given",
            where="--tokenizer",
            fix="add --tokenizer PATH_OR_HUB_NAME, or leave it to later with --skip-count --skip-tokenize (plain text only)",
        )
    path = _here(name, fetch)
    if not templated:
        return Opened(TokenizerSource(TokenizerKind.HF, path, backend=request.backend), None)
    speaker = _here(request.template_of, fetch) if request.template_of and request.template_of != name else path
    source, other = (TokenizerSource(TokenizerKind.HF, one) for one in (path, speaker))
    if speaker != path and open_tokenizer(source).digest != open_tokenizer(other).digest:
        raise ConfigError(
            f"{name} and {request.template_of} are different tokenizers: the template of one would be written with ids of the other",
            where="--vocab-file and --hf-tokenizer",
            fix="give one of them as --tokenizer, with --chat-template FILE where it has no template of its own",
        )
    return Opened(replace(other, backend=request.backend), chat_format(speaker, request.template))


def _here(name: str, fetch: Callable[[str], str]) -> str:
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"there is no {name}", where="--tokenizer", fix="check the path; a name on the Hub is ORG/NAME")
    return fetch(name)


def encoding_of(
    source: RecordSource, found: Found, opened: Opened, *, max_length: int | None, workers: int
) -> tuple[EncoderSource, dict[str, Any]]:
    """The encoder, and what the metadata says of it. The tokenizer's back end is settled on the first records of the source."""
    assert opened.ids is not None  # asked for
    shape = RecordAdapter(found, opened.template)
    inner: EncoderSource
    about = opened.template.about() if opened.template else {}
    if opened.template is not None and found.how is How.RENDERED:
        # The encoder of conversations sees whether the template has ended the document already.
        renamed = tuple(("text" if role == "messages" else role, column) for role, column in found.columns)
        shape = RecordAdapter(Found(How.TURNS, renamed))
        inner = ChatSource(opened.template, ("text",), Masking(labels=False), tools_key="tools")
    elif opened.template is not None:
        inner = _labelled(found, opened.template)
    else:
        chosen = choose(opened.ids, _first_texts(source, shape), workers=workers)
        inner, about = TextSource(chosen.source, append_eod=True, keys=("text",)), {"tokenizer": chosen.about}
    encoder: EncoderSource = ShapedSource(shape, inner)
    return (LimitedSource(encoder, max_length) if max_length is not None else encoder), about


def _labelled(found: Found, form: ChatFormat) -> EncoderSource:
    roles = dict(found.columns)
    tools = "tools" if "tools" in roles else None
    if found.how is How.PAIRS:
        return PairSource(form, tools_key=tools)
    prompt = "prompt" if "prompt" in roles else None
    if found.how is How.JUDGED:
        # Answers given as text or as one turn are read as answers to a prompt, which may be absent.
        return ChatSource(form, ("messages",), tools_key=tools, reward_key="label", binary=True, prompt_key=prompt)
    return ChatSource(form, ("messages",), tools_key=tools, prompt_key=prompt)


def _first_texts(source: RecordSource, shape: RecordAdapter) -> list[str]:
    """The texts of the first records."""
    make = shape.open()
    shaped = (make(record) for block in source.blocks(BlockStart()) for record in block.read().records)
    return [str(record["text"]) for record in islice(shaped, FIRST_RECORDS) if isinstance(record, dict) and "text" in record]
