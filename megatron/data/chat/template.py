# SPDX-License-Identifier: Apache-2.0
"""Rendering a conversation with a Jinja chat template, in a sandbox. Knows no ids, no roles and no files."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.errors import DataError

Turn = Mapping[str, Any]
Span = tuple[int, int]

DEFAULT, TOOL_USE = "default", "tool_use"


class RenderError(ValueError):
    """The template refuses this conversation, or fails on it."""


class Rendering(NamedTuple):
    """generated: the character spans inside `{% generation %}` blocks, in order; empty where the template has none."""

    text: str
    generated: tuple[Span, ...]


class GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: what is inside is put between two marks that no text can hold by accident."""

    tags = {"generation"}
    opening = f"\ufdd0{secrets.token_hex(8)}("
    closing = f"\ufdd0{secrets.token_hex(8)})"

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """The block becomes a call of `mark` around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("mark"), [], [], body)
        block.set_lineno(line)
        return block

    def mark(self, caller: Callable[[], str]) -> str:
        """The body between the marks."""
        return f"{self.opening}{caller()}{self.closing}"


class ChatTemplate:
    """The templates of one tokenizer: `default`, and `tool_use` where conversations with tools have their own.

    variables: names a template can use besides messages and tools (bos_token, eos_token, ...)
    moment:    what `strftime_now` tells; None = the clock, which makes the text depend on the day
    marked:    whether a template says with `{% generation %}` what the model writes
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any], *, moment: datetime | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: (moment or datetime.now()).strftime(pattern)
        self.marked = any(re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) for source in sources.values())
        self._variables = dict(variables)
        self._compiled = {}
        for name, source in sources.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except TemplateSyntaxError as error:
                raise DataError(
                    f"the chat template is not valid Jinja: {error.message}", where=f"{name}, line {error.lineno}", fix="fix the template"
                ) from error
        if DEFAULT not in self._compiled:
            raise DataError(f"no chat template is called {DEFAULT}", where=", ".join(sources) or None, fix=f"name one of them {DEFAULT}")

    def render(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False) -> Rendering:
        """The text of the turns. Raises RenderError when the template does not take them."""
        template = self._compiled[TOOL_USE if tools and TOOL_USE in self._compiled else DEFAULT]
        try:
            marked = template.render(
                **{**self._variables, "messages": turns, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
            )
        except TemplateError as error:
            raise RenderError(error.message or type(error).__name__) from error
        except Exception as error:  # a template is foreign code and raises whatever its operations raise, e.g. "a" + None
            raise RenderError(f"{type(error).__name__}: {error}") from error
        return _unmarked(marked)


def _unmarked(marked: str) -> Rendering:
    opening, closing = GenerationBlocks.opening, GenerationBlocks.closing
    if opening not in marked:
        return Rendering(marked, ())
    text, spans = "", []
    before, *blocks = marked.split(opening)
    text = before
    for block in blocks:
        inside, found, after = block.partition(closing)
        if not found or closing in after:
            raise RenderError("a {% generation %} block lies inside another")
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return Rendering(text, tuple(spans))


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(reason)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
