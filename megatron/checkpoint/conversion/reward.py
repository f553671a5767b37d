# SPDX-License-Identifier: Apache-2.0
"""Reward models: a head of one score per position in place of the vocabulary's, here and in transformers. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.formats.torch_file import load_canonical
from megatron.checkpoint.mapping.config_rows import ConfigRow, Theirs
from megatron.checkpoint.mapping.families import FAMILIES, family_of
from megatron.checkpoint.mapping.rows import Family, Row
from megatron.errors import ConfigError
from megatron.model.layer_state import LayerState
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer

HEAD = "rm_linear.weight"
"""FORMAT: [1, hidden] in the last slot, split along the input; there is no final_linear, also where embeddings are not tied."""
ENDING = "ForSequenceClassification"
SCORED = ("neox", "gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Names of the families that have such a class in transformers."""


def head_name(spec: ModelSpec) -> str:
    """The head's canonical name."""
    return f"{spec.num_layers + 4}.{HEAD}"


def scoring(family: Family) -> Family:
    """A family's form with a head of one score. Raises ConfigError where transformers has none."""
    if family.name not in SCORED:
        what = f"transformers has no {_class_of(family)}"
        raise ConfigError(what, where="architecture", fix=f"a reward model can be one of: {', '.join(SCORED)}")
    head = Row(f"{{head}}.{HEAD}", "score.weight")
    rows = (*(row for row in family.rows if not row.ours.startswith("{head}.")), head)
    config = tuple(_classified(row, family) for row in family.config)
    return replace(family, hf=_class_of(family), rows=rows, config=config, tied_alias=None, renamed=())


def _class_of(family: Family) -> str:
    return family.hf.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + ENDING


def _classified(row: ConfigRow, family: Family) -> ConfigRow:
    if isinstance(row, Theirs) and row.hf == "architectures":
        return replace(row, value=[_class_of(family)], default=[_class_of(family)])
    return row


def written_family(config: Mapping[str, Any]) -> Family:
    """By the content of a config.json that was written here, a reward model's too."""
    for family in FAMILIES if is_scoring(config) else ():
        if _class_of(family) == config["architectures"][0]:
            return scoring(family)
    return family_of(config)


def is_scoring(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that gives scores."""
    names = config.get("architectures") or [""]
    return str(names[0]).endswith(ENDING)


def score_fields(pad: int | None, rows: int) -> dict[str, Any]:
    """Fields of config.json: one score, and the id after which transformers looks for the last token of a row. rows: of the vocabulary

    Raises ConfigError without such an id."""
    if pad is None or not 0 <= pad < rows:
        what = "a reward model needs the id that fills up its rows" if pad is None else f"{pad} is no id of a vocabulary of {rows}"
        raise ConfigError(what, where="--pad-token-id", fix=f"give --pad-token-id N, 0 to {rows - 1}, an id that no text ends with")
    return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad}


def scores(spec: ModelSpec, state: Mapping[str, Tensor], tokens: Tensor, rounded: torch.dtype | None) -> Tensor:
    """[b, s, 1] float32: what our model has after its last norm, times the head. rounded: the weights are, to that dtype, first"""
    model = Transformer(spec, dtype=torch.float32).eval()
    last = model.plan[-1]
    if last.head is None:
        del model.sequential[str(last.number)]
    name = head_name(spec)
    load_canonical(model, {other: state[other] for other in state if other != name})
    head = state[name].float()
    with torch.no_grad():
        for parameter in model.parameters() if rounded is not None else ():
            parameter.copy_(parameter.to(rounded))
        stream = LayerState(tokens, torch.zeros_like(tokens, dtype=torch.int32))
        for module in model.sequential.values():
            stream = module(stream)
        return stream.hidden @ (head if rounded is None else head.to(rounded).float()).t()
