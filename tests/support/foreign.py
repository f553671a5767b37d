# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face directories of random weights, made without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.conversion.output_folder import content_of
from megatron.checkpoint.formats.hf_files import Planned, read_config, read_state, write_json, write_shards
from megatron.checkpoint.formats.neox_files import load_canonical
from megatron.checkpoint.loading.merge_tp import shapes_of
from megatron.checkpoint.mapping.families import family_named, family_of, neox_keys
from megatron.checkpoint.mapping.rows import bound_rows, to_canonical
from megatron.model.build_spec import build_spec
from megatron.model.spec import ModelSpec
from megatron.neox_arguments import NeoXArgs

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32, "intermediate_size": 48}
GQA = {**SIZES, "num_key_value_heads": 2, "hidden_act": "silu", "tie_word_embeddings": False}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48, "activation_function": "gelu_new"}
CONFIGS: dict[str, dict[str, Any]] = {
    "neox": {**SIZES, "hidden_act": "gelu", "rotary_pct": 0.25, "use_parallel_residual": True},
    "gpt2": GPT2,
    "llama": GQA,
    "llama_mha": {**GQA, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {**GQA, "num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {**GQA, "use_sliding_window": False},
    "qwen3": {**GQA, "head_dim": 8, "use_sliding_window": False},
    "olmo2": GQA,
}


def make_hf(folder: Path, name: str, *, vocab: int = 101, dtype: torch.dtype = torch.float32, limit: int = 10**9) -> dict[str, Tensor]:
    """Write the directory; returns its tensors. limit: bytes of a shard"""
    family = family_named(name.partition("_")[0])
    config = {"architectures": [family.hf], "model_type": family.model_type, "vocab_size": vocab, **CONFIGS[name]}
    keys = {"train_iters": 1, "train_micro_batch_size_per_gpu": 1, "global_num_gpus": 1, **neox_keys(family, config)}
    spec = build_spec(NeoXArgs.from_dict(keys))
    shapes = shapes_of(spec)
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for row in bound_rows(family, spec, vocab):
        parts = row.op.unpack([torch.randn(shapes[row.ours]) * 0.1], row.place)
        tensors.update({theirs: part.to(dtype).contiguous() for theirs, part in zip(row.theirs, parts, strict=True)})
    write_model(folder, tensors, config, limit=limit)
    return tensors


def write_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, limit: int = 10**9) -> None:
    """A Hugging Face directory of these tensors, written as the conversion does. limit: bytes of a shard"""
    folder.mkdir(exist_ok=True)
    plan = [Planned(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    write_shards(folder, plan, tensors.items(), lambda _, tensor: content_of(tensor), limit=limit)
    write_json(folder / "config.json", config)


def load_hf(folder: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Copy the weights of a Hugging Face directory into a `Transformer` of one tensor rank."""
    load_canonical(model, to_canonical(family_of(read_config(folder)), read_state(folder), spec))


def check_same(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The directory holds these tensors, bit by bit, and no others."""
    found = read_state(folder)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
