# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> tokenizer."""

from __future__ import annotations

from megatron.errors import ConfigError
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer.registry import open_tokenizer
from megatron.tokenizer.tokenizer import Tokenizer, TokenizerKind, TokenizerSource, padded_vocab_size


def tokenizer_source(args: NeoXArgs) -> TokenizerSource:
    """The tokenizer named by `tokenizer_type`, `vocab_file` and `merge_file`."""
    return TokenizerSource(TokenizerKind(args.data.tokenizer_type), args.data.vocab_file, args.data.merge_file)


def build_tokenizer(args: NeoXArgs) -> Tokenizer:
    """Open the tokenizer and check it against `padded_vocab_size` where the configuration gives one.

    Raises DataError for missing or damaged files, ConfigError for a vocabulary that does not fit the model.
    """
    tokenizer = open_tokenizer(tokenizer_source(args))
    padded = args.model.padded_vocab_size
    if padded is not None and tokenizer.vocab_size > padded:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {padded} rows",
            where="padded_vocab_size",
            fix=f"leave padded_vocab_size out, or give at least {tokenizer.vocab_size}",
        )
    return tokenizer


def with_vocabulary(args: NeoXArgs, tokenizer: Tokenizer) -> NeoXArgs:
    """`args` with `padded_vocab_size` (rows of the embedding) filled in from the tokenizer where it was not given."""
    if args.model.padded_vocab_size is not None:
        return args
    rows = padded_vocab_size(tokenizer.vocab_size, args.model.make_vocab_size_divisible_by, args.runtime.model_parallel_size)
    return args.replace(padded_vocab_size=rows)
