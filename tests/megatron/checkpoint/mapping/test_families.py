# SPDX-License-Identifier: Apache-2.0
"""Every dialect is recognised and says the same weights; its orders of rows are those of the layers that use them."""

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.formats.torch_file import canonical_state
from megatron.checkpoint.loading.merge_tp import shardings_of
from megatron.checkpoint.mapping.families import (
    DIALECTS,
    LEGACY_LLAMA,
    NEOX_LEGACY,
    NEOX_TE,
    canonical_keys,
    canonical_weights,
    dialect,
    dialect_of,
    of_rank,
)
from megatron.checkpoint.mapping.rows import from_canonical
from megatron.errors import CheckpointError
from megatron.model.build_spec import build_spec
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.sharding import join, split
from megatron.neox_arguments import NeoXArgs
from support.families import family_spec
from support.tiny import tiny


def weights_of(spec: ModelSpec) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in canonical_state(Transformer(spec)).items()}


@pytest.mark.parametrize("style", ["neox", "gpt2", "llama", "qwen3"])
def test_there_and_back(style: str):
    """Each is told from the others by its names, with norms of both kinds, gated and not, GQA and not."""
    spec = family_spec(style)
    state = weights_of(spec)
    assert dialect_of(state) is None and canonical_weights(state, spec) is state
    for family in DIALECTS:
        if "legacy_llama" in family.name and not spec.blocks[0].mlp.gated:
            continue
        foreign = dict(from_canonical(family, state, spec))
        assert dialect_of(foreign) == family, family.name
        again = canonical_weights({**foreign, **extra(family.name)}, spec)
        assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state), family.name


def extra(name: str) -> dict[str, Tensor]:
    return {"2.mlp._extra_state": torch.zeros(3)} if "te" in name.split("_") else {}


def test_every_rank_speaks_for_itself():
    """Interleaved key heads and exchanged halves are of a rank's own part: mapping ranks and joining gives the whole."""
    spec = family_spec("llama")
    whole, how = weights_of(spec), shardings_of(spec, 2)
    spoken = [
        from_canonical(NEOX_TE, {name: split(tensor, how[name], rank, 2) for name, tensor in whole.items()}, of_rank(spec, 2))
        for rank in (0, 1)
    ]
    ranks = [canonical_weights(shard, spec, ranks=2) for shard in spoken]
    for name, tensor in whole.items():
        assert torch.equal(join([rank[name] for rank in ranks], how[name]), tensor), name


def test_names_that_nobody_claims():
    spec = family_spec("neox")
    foreign = dict(from_canonical(NEOX_LEGACY, weights_of(spec), spec))
    with pytest.raises(CheckpointError, match="claimed by no row 2.mlp.adapter.weight"):
        canonical_weights({**foreign, "2.mlp.adapter.weight": torch.zeros(1)}, spec)
    # a name of ours beside those of the dialect would be a second tensor for the same place
    with pytest.raises(CheckpointError, match=r"claimed by no row 2.mlp.linear1.weight"):
        canonical_weights({**foreign, "2.mlp.linear1.weight": torch.zeros(1)}, spec)
    del foreign["3.mlp.dense_4h_to_h.bias"]
    with pytest.raises(CheckpointError, match="missing 3.mlp.dense_4h_to_h.bias"):
        canonical_weights(foreign, spec)


def test_orders_of_rows():
    """TransformerEngine keeps a key head with its query heads and reads the gate first; w1 is LLaMA's gate."""
    spec = family_spec("llama")
    attention, width = spec.blocks[0].attention, spec.blocks[0].mlp.width
    state = weights_of(spec)
    te = from_canonical(NEOX_TE, state, spec)
    queries, keys, values = state["2.attention.query_key_value.weight"].split((64, 32, 32))
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 16)
    expected = torch.cat((queries[:32], keys[:16], values[:16], queries[32:], keys[16:], values[16:]))
    assert torch.equal(te["2.attention.qkv.weight"], expected)
    value, gate = state["2.mlp.linear1.weight"].split(width)
    assert torch.equal(te["2.mlp.fc1_weight"], torch.cat((gate, value)))
    legacy = from_canonical(dialect(mlp=LEGACY_LLAMA), state, spec)
    assert torch.equal(legacy["2.mlp.w1.weight"], gate) and torch.equal(legacy["2.mlp.w3.weight"], value)


def test_keys():
    """Keys that ask for TransformerEngine's layers become those of the same model with ours."""
    te = tiny("llama", te_mha=True, te_layernorm_mlp=True, norm="te_rmsnorm", padded_vocab_size=512)
    args = NeoXArgs.from_dict(canonical_keys(te))
    assert (args.model.norm, args.model.te_mha, args.model.use_bias_in_attn_linear, args.model.use_bias_in_mlp) == (
        "rmsnorm",
        False,
        True,
        True,
    )
    (row,) = dialect("te", "te", "te").config
    assert row.to_hf(canonical_keys(te), build_spec(args))["norm"] == "te_rmsnorm"
    assert canonical_keys(tiny("neox")) == tiny("neox")
