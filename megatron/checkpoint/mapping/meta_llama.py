# SPDX-License-Identifier: Apache-2.0
"""LLaMA as Meta published it: the files consolidated.NN.pth (each a slice of most tensors) and params.json, and rows of their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.formats.hf_files import read_json
from megatron.checkpoint.formats.torch_file import LazyState, tensor_table
from megatron.checkpoint.mapping.config_rows import Config, FieldPair, Fixed, Heads, Theirs
from megatron.checkpoint.mapping.ops import Chain, Concat, FuseQKV, PadVocab, RotaryPairs
from megatron.checkpoint.mapping.rows import COMMON, NO_WINDOWS, ONE_ATTENTION_BIAS, PLAIN_NORMS, Family, Row, rms_norms, sizes
from megatron.errors import CheckpointError, ConfigError
from megatron.model.spec import ModelSpec, RopeScaling

B = "{slot}."
L = "layers.{layer}."
SCALED_LENGTH, STRETCHED_LENGTH = 8192, 131072


@dataclass(frozen=True)
class Multiples:
    """The MLP's width, which their file says as 2/3 of 4 h, times ffn_dim_multiplier, filled up to a multiple."""

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """An explicit literal width."""
        width = int(8 * hf["dim"] / 3)
        if hf.get("ffn_dim_multiplier") is not None:
            width = int(hf["ffn_dim_multiplier"] * width)
        multiple = hf.get("multiple_of", 256)
        return {"intermediate_size": -(-width // multiple) * multiple, "intermediate_size_convention": "literal"}

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Fields that give our width."""
        width, base = spec.blocks[0].mlp.width, int(8 * spec.hidden_size / 3)
        # Half a feature less, so that rounding cannot lead past the width; filling up makes it whole.
        return {"multiple_of": 256 if width % 256 == 0 else width, "ffn_dim_multiplier": (width - 0.5) / base}


@dataclass(frozen=True)
class MetaRope:
    """Rotary base and LLaMA 3's scaling, of which their file says only that it is used; and the length, which follows."""

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Our keys."""
        base = hf.get("rope_theta") or 10000.0
        base = int(base) if float(base).is_integer() else base
        length = hf.get("max_seq_len") or self._length(hf)
        keys = {"pos_emb": "rotary", "rotary_emb_base": base, "max_position_embeddings": length, "seq_length": length}
        if not hf.get("use_scaled_rope", False):
            return keys
        scaling = {
            "rope_type": "llama3",
            "factor": float(hf.get("rope_scaling_factor") or 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(hf.get("rope_high_freq_factor") or 4.0),
            "original_max_position_embeddings": SCALED_LENGTH,
        }
        return {**keys, "rope_scaling": scaling}

    def _length(self, hf: Config) -> int:
        """The length that the generation of a file was trained with: they are told apart by what else it says."""
        if hf.get("use_scaled_rope", False):
            return STRETCHED_LENGTH
        if (hf.get("rope_theta") or 10000.0) > 10000.0:
            return SCALED_LENGTH if hf["rope_theta"] <= 500000.0 else 2 * SCALED_LENGTH  # LLaMA 3; Code LLaMA
        return 2048 if hf.get("norm_eps", 1e-5) < 1e-5 else 4096  # LLaMA 1; 2

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """Their fields."""
        attention = spec.blocks[0].attention
        if attention.rotary is None or attention.rotary.dim != attention.head_dim:
            where = "pos_emb" if attention.rotary is None else "rotary_pct"
            raise ConfigError("this architecture rotates whole heads", where=where, fix="choose another architecture")
        fields = {"rope_theta": attention.rotary.base, "max_seq_len": neox["max_position_embeddings"]}
        scaling = attention.rotary.scaling
        if scaling is None:
            return fields
        same = {"factor": scaling.factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling != RopeScaling(kind="llama3", original_max_position_embeddings=SCALED_LENGTH, **same):
            fix = f"only llama3 with low_freq_factor 1 and original_max_position_embeddings {SCALED_LENGTH} can be said"
            raise ConfigError("this architecture cannot express this 'rope_scaling'", where="rope_scaling", fix=fix)
        factors = {"rope_scaling_factor": scaling.factor, "rope_high_freq_factor": scaling.high_freq_factor}
        return {**fields, "use_scaled_rope": True, **factors}


META_LLAMA = Family(
    name="meta_llama",
    hf="Meta's LLaMA",
    model_type="meta_llama",
    ignored=(r"^rope\.freqs$", r"\.inner_attention\.rope\.freqs$"),
    rows=(
        Row("0.word_embeddings.weight", "tok_embeddings.weight", PadVocab()),
        Row(B + "input_layernorm.scale", L + "attention_norm.weight"),
        Row(B + "post_attention_layernorm.scale", L + "ffn_norm.weight"),
        Row(
            B + "attention.query_key_value.weight",
            tuple(f"{L}attention.w{part}.weight" for part in "qkv"),
            Chain((RotaryPairs(), FuseQKV())),
        ),
        Row(B + "attention.dense.weight", L + "attention.wo.weight"),
        # w3 is the value, w1 the gate
        Row(B + "mlp.linear1.weight", (L + "feed_forward.w3.weight", L + "feed_forward.w1.weight"), Concat(0, 2)),
        Row(B + "mlp.linear2.weight", L + "feed_forward.w2.weight"),
        Row("{norm}.norm.scale", "norm.weight"),
        Row("{head}.final_linear.weight", "output.weight", PadVocab()),
    ),
    config=(
        *COMMON,
        *PLAIN_NORMS,
        *NO_WINDOWS,
        *sizes("dim", "n_layers", "n_heads", FieldPair("num_kv_heads", "n_kv_heads")),
        Heads("dim", "n_heads", free=False),
        Multiples(),
        MetaRope(),
        Fixed("activation", "swiglu", "gelu"),
        *rms_norms("norm_eps", 1e-5),
        Fixed("use_bias_in_attn_linear", False, True),
        ONE_ATTENTION_BIAS,
        Fixed("use_bias_in_mlp", False, True),
        Fixed("gpt_j_residual", False, False),
        Fixed("no_weight_tying", True, False),
        Fixed("hidden_dropout", 0.0, 0.0),
        Fixed("attention_dropout", 0.0, 0.0),
        Theirs("moe_args", None, None),
        Theirs("quantization_args", None, None),
        Theirs("lora_args", None, None),
        Theirs("vision_chunk_size", None, None),
    ),
)


PARAMS = "params.json"
_SHARD = re.compile(r"^consolidated\.(\d+)\.pth$")
_ROWS = re.compile(r"(\.attention\.w[qkv]|\.feed_forward\.w[13]|^output)\.weight$")
_COLUMNS = re.compile(r"(\.attention\.wo|\.feed_forward\.w2)\.weight$")
_EMBEDDING = "tok_embeddings.weight"


def shard_files(directory: Path) -> list[Path]:
    """The files in order. Raises CheckpointError when there is none, or one is missing between others."""
    found = {int(m.group(1)): path for path in directory.iterdir() if (m := _SHARD.match(path.name))} if directory.is_dir() else {}
    absent = [f"consolidated.{number:02d}.pth" for number in range(max(found, default=0) + 1) if number not in found]
    if absent:
        fix = "give the folder with params.json and all consolidated.NN.pth"
        raise CheckpointError(f"{absent[0]} is missing", where=str(directory), fix=fix)
    return [found[number] for number in range(len(found))]


def read_meta(directory: Path) -> tuple[dict[str, Any], LazyState]:
    """params.json with the vocabulary's size filled in, and all tensors, joined from their slices on access.

    Raises CheckpointError when files are missing or damaged, or together do not have the sizes that params.json says.
    """
    params = read_json(directory / PARAMS, fix="give the folder with params.json and all consolidated.NN.pth")
    files = shard_files(directory)
    shards = [{name: tensor.shape for name, tensor in _content(path).items()} for path in files]
    dims: dict[str, int | None] = {}
    for number, shard in enumerate(shards):
        if odd := sorted(set(shard) ^ set(shards[0])):
            raise CheckpointError(f"{files[0].name} and {files[number].name} hold different tensors: {odd[:6]}", where=str(directory))
    for name, shape in shards[0].items():
        dims[name] = _slice_dim(name, shape, params["dim"])
    _check_sizes(params, shards, dims, directory)
    if params.get("vocab_size", -1) < 0:
        rows = shards[0][_EMBEDDING][0]
        params["vocab_size"] = rows * len(files) if dims[_EMBEDDING] == 0 else rows
    return params, LazyState({name: partial(_joined, files, name, dim) for name, dim in dims.items()})


def _slice_dim(name: str, shape: torch.Size, width: int) -> int | None:
    """The dimension along which a tensor is spread over the files; None = each has all of it."""
    if name == _EMBEDDING:
        return 0 if shape[1] == width else 1  # LLaMA 3 spreads the vocabulary, its forerunners the features
    if _ROWS.search(name):
        return 0
    return 1 if _COLUMNS.search(name) else None


def _check_sizes(params: dict[str, Any], shards: list[dict[str, torch.Size]], dims: dict[str, int | None], directory: Path) -> None:
    """A missing last file, or one of another model, shows in the sums of sizes."""
    heads, width = params["n_heads"], params["dim"]
    kv = (params.get("n_kv_heads") or heads) * (width // heads)
    wanted = {"wq": width, "wk": kv, "wv": kv, "wo": width}
    for name, dim in dims.items():
        size = wanted.get(name.split(".")[-2]) if dim is not None else None
        found = None if dim is None else sum(shard[name][dim] for shard in shards)
        if size is not None and found != size:
            what = f"{name} has {found} {('rows', 'columns')[dim or 0]} in {len(shards)} files, and {size} by {PARAMS}"
            raise CheckpointError(what, where=str(directory), fix="copy all consolidated.NN.pth of one model")


def _joined(files: list[Path], name: str, dim: int | None) -> Tensor:
    """One tensor. Files are opened for it alone: what is mapped into memory goes when it is done."""
    if dim is None or len(files) == 1:
        return _content(files[0])[name]
    return torch.cat([_content(path)[name] for path in files], dim)


def _content(path: Path) -> dict[str, Tensor]:
    return tensor_table(path, "give raw weights of LLaMA as Meta publishes them")
