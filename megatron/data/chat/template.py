# SPDX-License-Identifier: Apache-2.0
"""Chat templates: found in a tokenizer folder with its special tokens, and rendered with Jinja in a sandbox."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.errors import DataError
from megatron.tokenizer.hugging_face import declared_tokens, read_object

Turn = Mapping[str, Any]
Span = tuple[int, int]

DEFAULT, TOOL_USE = "default", "tool_use"
CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"


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
    spans = []
    text, *blocks = marked.split(opening)
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


def template_sources(folder: Path, file: Path | None = None) -> dict[str, str]:
    """Name -> source of each template: those of `file` if given, else the folder's.

    In a folder chat_template.jinja (with additional_chat_templates/) comes before tokenizer_config.json. Raises DataError
    when there is none.
    """
    if file is not None:
        return _named(read_object(file), file) if file.suffix == ".json" else {DEFAULT: file_text(file)}
    if (folder / TEMPLATE_FILE).exists():
        more = {path.stem: file_text(path) for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
        return {**more, DEFAULT: file_text(folder / TEMPLATE_FILE)}
    config = folder / CONFIG
    found = _named(read_object(config), config) if config.exists() else {}
    if not found:
        raise DataError(
            "the tokenizer has no chat template",
            where=str(folder),
            fix=f"give one as a file (--chat-template), as {TEMPLATE_FILE} in the folder, or as chat_template in {CONFIG}",
        )
    return found


def special_tokens(folder: Path) -> dict[str, Any]:
    """bos_token, eos_token, ... and additional_special_tokens as the folder's files name them."""
    return {role: token for role, token in declared_tokens(folder).items() if token}


def _named(content: Mapping[str, Any], path: Path) -> dict[str, str]:
    given = content.get("chat_template")
    if isinstance(given, str):
        return {DEFAULT: given}
    entries = [entry for entry in given or () if isinstance(entry, Mapping) and "name" in entry and "template" in entry]
    if given is not None and (not isinstance(given, list) or len(entries) != len(given)):
        raise DataError("chat_template is neither text nor a list of {name, template}", where=str(path), fix="fix the file")
    return {entry["name"]: entry["template"] for entry in entries}


def file_text(path: Path) -> str:
    """The text of a template file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the chat template cannot be read: {error}", where=str(path), fix="give a Jinja file in UTF-8") from error
