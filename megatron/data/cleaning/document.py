# SPDX-License-Identifier: Apache-2.0
"""A document on its way through the cleaning stages. Knows no stage and no file format but its own passing form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass
class Document:
    """One record of the input.

    text:   what the stages read and may change
    at:     file:line of the record (file:row in Parquet)
    record: all other fields, kept as they were
    """

    text: str
    at: str
    record: dict[str, Any] = field(default_factory=dict)

    def pack(self) -> bytes:
        """One line, for the next stage."""
        return orjson.dumps([self.text, self.at, self.record], option=orjson.OPT_APPEND_NEWLINE)

    @staticmethod
    def unpack(line: bytes) -> Document:
        """The document of a line of `pack`."""
        text, at, record = orjson.loads(line)
        return Document(text, at, record)


def look_up(record: Mapping[str, Any], key: str) -> Any:
    """The value under a key, or under a path of keys with dots; None where there is none.

    >>> look_up({"meta": {"lang": "py"}}, "meta.lang")
    'py'
    """
    if key in record:
        return record[key]
    found: Any = record
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found
