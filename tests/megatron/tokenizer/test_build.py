# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a configuration, and the size it gives the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError
from support.tiny import tiny

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer"


def arguments(**overrides: Any) -> Any:
    from megatron.neox_arguments import NeoXArgs

    return NeoXArgs.from_dict(tiny("neox", vocab_file=str(GOLDEN), **overrides))


def test_padded_vocabulary_is_filled_in_once() -> None:
    from megatron.tokenizer.build import build_tokenizer, with_vocabulary

    args = arguments(make_vocab_size_divisible_by=100)
    tokenizer = build_tokenizer(args)
    assert tokenizer.name == "HFTokenizer"
    assert with_vocabulary(args, tokenizer).model.padded_vocab_size == 600
    assert with_vocabulary(arguments(padded_vocab_size=640), tokenizer).model.padded_vocab_size == 640
    assert build_tokenizer(arguments(tokenizer_type="CharLevelTokenizer")).vocab_size == 512
    with pytest.raises(ConfigError, match="512 ids, the model only 384 rows"):
        build_tokenizer(arguments(padded_vocab_size=384))
