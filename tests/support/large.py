# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of many layers, larger than what a tool that reads it should need, made without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from support.specs import model_spec

LAYERS, WIDTH = 30, 12_000


def spec_of_large() -> Any:
    """Many blocks with a wide layer each."""
    spec = model_spec(layers=LAYERS)
    return replace(spec, blocks=tuple(replace(block, ffn=replace(block.mlp, width=WIDTH)) for block in spec.blocks))


def write_large(folder: Path) -> int:
    """Weights and two moments in one file; returns its size in bytes."""
    import torch

    from megatron.checkpoint.formats.neox_files import model_file
    from megatron.checkpoint.formats.optimizer_files import RECORD
    from megatron.checkpoint.formats.torch_file import SEQUENTIAL, canonical_state
    from megatron.model.transformer import Transformer

    folder.mkdir(parents=True)
    model = canonical_state(Transformer(spec_of_large(), device="meta"))
    weights = {name: torch.full(tensor.shape, float(number)) for number, (name, tensor) in enumerate(model.items())}
    names = list(weights)
    state = {
        number: {"step": torch.tensor(1.0), "exp_avg": torch.full_like(weights[name], number), "exp_avg_sq": torch.ones_like(weights[name])}
        for number, name in enumerate(names)
    }
    groups = [{"lr": 0.1, "params": list(range(len(names)))}]
    content = {
        "module": {f"{SEQUENTIAL}{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": state, "param_groups": groups},
        "run_state": {"samples": 4, "tokens": 256},
        RECORD: {"kind": "AdamW", "groups": [names]},
    }
    torch.save(content, model_file(folder))
    return model_file(folder).stat().st_size
