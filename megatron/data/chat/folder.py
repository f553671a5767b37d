# SPDX-License-Identifier: Apache-2.0
"""Finding the chat template and the special tokens of a tokenizer folder. Knows no conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.data.chat.template import DEFAULT
from megatron.errors import DataError

CONFIG = "tokenizer_config.json"
TOKEN_FILES = ("special_tokens_map.json", CONFIG)  # the later wins
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def template_sources(folder: Path, file: Path | None = None) -> dict[str, str]:
    """Name -> source of each template: those of `file` if given, else the folder's.

    In a folder chat_template.jinja (with additional_chat_templates/) comes before tokenizer_config.json. Raises DataError
    when there is none.
    """
    if file is not None:
        return _named(_read(file), file) if file.suffix == ".json" else {DEFAULT: file_text(file)}
    if (folder / TEMPLATE_FILE).exists():
        more = {path.stem: file_text(path) for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
        return {**more, DEFAULT: file_text(folder / TEMPLATE_FILE)}
    config = folder / CONFIG
    found = _named(_read(config), config) if config.exists() else {}
    if not found:
        raise DataError(
            "the tokenizer has no chat template",
            where=str(folder),
            fix=f"give one as a file (--chat-template), as {TEMPLATE_FILE} in the folder, or as chat_template in {CONFIG}",
        )
    return found


def special_tokens(folder: Path) -> dict[str, Any]:
    """bos_token, eos_token, ... and additional_special_tokens as the folder's files name them."""
    found: dict[str, Any] = {}
    for name in TOKEN_FILES:
        content = _read(folder / name) if (folder / name).exists() else {}
        for role in ROLES:
            if token := _token(content.get(role)):
                found[role] = token
        if more := content.get("additional_special_tokens"):
            found["additional_special_tokens"] = [_token(token) for token in more]
    return found


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


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}", where=str(path), fix="download or write it again") from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path), fix="download or write it again")
    return content


def _token(value: Any) -> str | None:
    token = value.get("content") if isinstance(value, Mapping) else value
    return token if isinstance(token, str) and token else None
