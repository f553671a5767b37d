# SPDX-License-Identifier: Apache-2.0
"""A wrong flag is named before the required ones that are missing because of it."""

from __future__ import annotations

import pytest

from megatron.errors import ConfigError
from megatron.tool_flags import ToolParser


def parser(*, abbreviations: bool) -> ToolParser:
    flags = ToolParser(allow_abbrev=abbreviations, add_help=False)
    flags.add_argument("--vocab-file")
    flags.add_argument("--input", nargs="+", required=True)
    flags.add_argument("--workers", type=int, choices=[1, 2])
    flags.add_argument("rest", nargs="*")
    return flags


def test_right_words_are_read() -> None:
    given = parser(abbreviations=True).parse_args(["--vocab", "v", "--input=a", "--workers", "2"])
    assert (given.vocab_file, given.input, given.workers) == ("v", ["a"], 2)
    assert parser(abbreviations=False).parse_args(["--input", "a", "--", "--odd"]).rest == ["--odd"]


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["--inptu", "a"], "unknown flag --inptu", "is --input meant?"),
        (["--input", "a", "--zzz=1"], "unknown flag --zzz", "--help shows all flags"),
        (["--vocab", "v", "--input", "a"], "unknown flag --vocab", "is --vocab-file meant?"),
        ([], "the following arguments are required: --input", "--help"),
        (["--input", "a", "--workers", "3"], "invalid choice", "--help"),
    ],
)
def test_mistakes_are_reports(words: list[str], what: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parser(abbreviations=False).parse_args(words)
    assert fix in str(caught.value.fix) and caught.value.exit_code == 77
