# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> what exports this run's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.conversion.exporting.exporter import Exporter
from megatron.checkpoint.conversion.exporting.hf_export import Export, family_for, tokenizer_file
from megatron.model.build import build_spec, parameter_dtype
from megatron.model.spec import ModelSpec
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer.build import build_tokenizer


def require_exportable(args: NeoXArgs) -> None:
    """With `save_hf`: raise ConfigError, naming the keys, for a model that no Hugging Face architecture can be."""
    if args.checkpoint.save_hf is not False:
        family_for(args.to_flat(), build_spec(args))


def build_exporter(args: NeoXArgs, spec: ModelSpec, *, rank: int, started_from: Mapping[str, Any]) -> Exporter | None:
    """What writes this run's checkpoints as Hugging Face models, on the first rank; None where nothing is to be written.

    started_from: what checkpoints keep of the Hugging Face model that the run began with; empty for another beginning
    """
    section = args.checkpoint
    if section.save_hf is False or not section.save or rank != 0:
        return None
    keys = args.to_flat()
    tokenizer = build_tokenizer(args)
    # Rows that filled up the model it was made of are not given back, unless the tokenizer has grown into them.
    known = started_from.get("vocab_size")
    export = Export(
        family=family_for(keys, spec, started_from.get("architecture")),
        keys=keys,
        spec=spec,
        dtype=parameter_dtype(args),
        rows=None if known is None else min(spec.vocab_size, max(int(known), tokenizer.vocab_size)),
        fields=started_from.get("token_ids") or {"bos_token_id": None, "eos_token_id": tokenizer.eod},
        tokenizer=tokenizer_file(args.data.tokenizer_type, args.data.vocab_file),
    )
    return Exporter(Path(section.save), export, every=1 if section.save_hf is True else int(section.save_hf))
