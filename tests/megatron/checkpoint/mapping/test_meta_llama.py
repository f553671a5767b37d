# SPDX-License-Identifier: Apache-2.0
"""Raw LLaMA weights in one file and in several, against the model's equations with neighbouring pairs as complex numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.checkpoint.formats.neox_files import load_canonical
from megatron.checkpoint.formats.torch_file import canonical_state
from megatron.checkpoint.mapping.families import hf_config, neox_keys
from megatron.checkpoint.mapping.meta_llama import META_LLAMA, read_meta
from megatron.checkpoint.mapping.rows import from_canonical, to_canonical
from megatron.errors import CheckpointError, ConfigError
from megatron.model.build_spec import build_spec
from megatron.model.transformer import Transformer
from megatron.neox_arguments import NeoXArgs

RUN = {"train_micro_batch_size_per_gpu": 1, "train_iters": 1, "global_num_gpus": 1, "attention_over_documents": "joined"}
PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1}
VOCAB, WIDTH = 50, 88  # int(8 * 32 / 3) = 85, up to a multiple of 8


def raw_weights(kv_heads: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"tok_embeddings.weight": (VOCAB, 32), "norm.weight": (32,), "output.weight": (VOCAB, 32), "rope.freqs": (4,)}
    for layer in range(2):
        rows = {"wq": 32, "wk": 8 * kv_heads, "wv": 8 * kv_heads, "wo": 32}
        shapes |= {f"layers.{layer}.attention.{name}.weight": (size, 32) for name, size in rows.items()}
        shapes |= {f"layers.{layer}.feed_forward.{name}.weight": (WIDTH, 32) for name in ("w1", "w3")}
        shapes[f"layers.{layer}.feed_forward.w2.weight"] = (32, WIDTH)
        shapes |= {f"layers.{layer}.{name}.weight": (32,) for name in ("attention_norm", "ffn_norm")}
    return {name: torch.randn(shape) * 0.3 + len(shape) % 2 for name, shape in shapes.items()}


def sliced(weights: dict[str, Tensor], count: int, rank: int, embedding_dim: int) -> dict[str, Tensor]:
    """What file `rank` of `count` holds."""
    dims = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": embedding_dim}
    table = {name: dims.get(name.split(".")[-2]) for name in weights}
    return {name: w if table[name] is None else w.chunk(count, table[name])[rank].clone() for name, w in weights.items()}


def save(directory: Path, weights: dict[str, Tensor], params: dict[str, Any], count: int = 1, embedding_dim: int = 1) -> None:
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(params))
    for rank in range(count):
        torch.save(sliced(weights, count, rank, embedding_dim), directory / f"consolidated.{rank:02d}.pth")


def logits_of(w: dict[str, Tensor], kv_heads: int, ids: Tensor) -> Tensor:
    """ids [s] -> [s, v], by the equations (arXiv 2302.13971, 2104.09864)."""

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale

    def turn(x: Tensor) -> Tensor:
        angles = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        pairs = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(pairs).flatten(-2)

    h = w["tok_embeddings.weight"][ids]
    for layer in range(2):
        at = {name.removeprefix(f"layers.{layer}."): t for name, t in w.items()}
        x = norm(h, at["attention_norm.weight"])
        q, k, v = (F.linear(x, at[f"attention.w{name}.weight"]).unflatten(-1, (-1, 8)) for name in "qkv")
        k, v = (part.repeat_interleave(4 // kv_heads, 1) for part in (turn(k), v))
        scores = torch.einsum("snd,tnd->nst", turn(q), k) / 8**0.5
        ahead = torch.ones(len(ids), len(ids)).triu(1).bool()
        seen = torch.einsum("nst,tnd->snd", scores.masked_fill(ahead, float("-inf")).softmax(-1), v)
        h = h + F.linear(seen.flatten(1), at["attention.wo.weight"])
        x = norm(h, at["ffn_norm.weight"])
        inner = F.silu(F.linear(x, at["feed_forward.w1.weight"])) * F.linear(x, at["feed_forward.w3.weight"])
        h = h + F.linear(inner, at["feed_forward.w2.weight"])
    return F.linear(norm(h, w["norm.weight"]), w["output.weight"])


@pytest.mark.parametrize(("kv_heads", "count", "embedding_dim"), [(4, 1, 1), (2, 2, 1), (4, 4, 0)])
def test_logits_and_back(kv_heads: int, count: int, embedding_dim: int, tmp_path: Path):
    weights = raw_weights(kv_heads)
    if embedding_dim == 0:  # rows that four files share
        weights |= {name: torch.cat((weights[name], weights[name][:2])) for name in ("tok_embeddings.weight", "output.weight")}
    params = {**PARAMS, **({} if kv_heads == 4 else {"n_kv_heads": kv_heads})}
    save(tmp_path / "raw", weights, params, count, embedding_dim)
    found, state = read_meta(tmp_path / "raw")
    assert found["vocab_size"] == len(weights["output.weight"])
    args = NeoXArgs.from_dict({**RUN, **neox_keys(META_LLAMA, found)})
    spec = build_spec(args)
    assert spec.blocks[0].mlp.width == WIDTH
    model = Transformer(spec).eval()
    load_canonical(model, to_canonical(META_LLAMA, state, spec))
    ids = torch.randint(0, VOCAB, (17,))
    with torch.no_grad():
        assert (model(ids[None]).full()[0] - logits_of(weights, kv_heads, ids)).abs().max() < 1e-4
    back = from_canonical(META_LLAMA, canonical_state(model), spec)
    assert set(back) == set(weights) - {"rope.freqs"}
    assert all(torch.equal(back[name], weights[name]) for name in back)
    written = hf_config(META_LLAMA, args.to_flat(), spec)
    assert build_spec(NeoXArgs.from_dict({**RUN, **neox_keys(META_LLAMA, written)})) == spec


def test_params():
    """Widths and lengths of published models; LLaMA 3's scaling; what there is no row for."""
    llama2 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": 32000}
    keys = neox_keys(META_LLAMA, llama2)
    assert (keys["intermediate_size"], keys["seq_length"], keys["rotary_emb_base"]) == (11008, 4096, 10000)
    llama3 = {
        "dim": 4096,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
        "n_heads": 32,
        "n_kv_heads": 8,
        "n_layers": 32,
        "norm_eps": 1e-05,
    }
    llama3 |= {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256}
    keys = neox_keys(META_LLAMA, llama3)
    assert (keys["intermediate_size"], keys["num_kv_heads"], keys["max_position_embeddings"]) == (14336, 8, 131072)
    assert (keys["rope_scaling"]["rope_type"], keys["rope_scaling"]["factor"]) == ("llama3", 8.0)
    with pytest.raises(ConfigError, match="moe_args"):
        neox_keys(META_LLAMA, {**llama3, "moe_args": {"num_experts": 16}})


def test_what_is_missing_or_damaged(tmp_path: Path):
    weights = raw_weights(2)
    for name, spoil, match in (
        ("gap", lambda folder: (folder / "consolidated.00.pth").unlink(), "consolidated.00.pth is missing"),
        ("last", lambda folder: (folder / "consolidated.01.pth").unlink(), "wq.weight has 16 rows in 1 files, and 32 by params.json"),
        ("params", lambda folder: (folder / "params.json").unlink(), "params.json is missing"),
        ("cut", lambda folder: (folder / "consolidated.01.pth").write_bytes(b"PK"), "consolidated.01.pth"),
        ("names", lambda folder: torch.save({}, folder / "consolidated.01.pth"), "hold different tensors"),
    ):
        save(tmp_path / name, weights, {**PARAMS, "n_kv_heads": 2}, 2)
        spoil(tmp_path / name)
        with pytest.raises(CheckpointError, match=match):
            try:
                read_meta(tmp_path / name)
            except CheckpointError as error:
                raise CheckpointError(f"{error} {error.where}") from error
