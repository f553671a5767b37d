# SPDX-License-Identifier: Apache-2.0
"""Names: what is missing or claimed by nobody is an error before any tensor is read."""

import pytest
import torch

from megatron.checkpoint.formats.neox_files import load_canonical
from megatron.checkpoint.formats.torch_file import LazyState, canonical_state
from megatron.checkpoint.mapping.families import FAMILIES, family_named, family_of
from megatron.checkpoint.mapping.meta_llama import META_LLAMA
from megatron.checkpoint.mapping.rows import bound_rows, from_canonical, to_canonical
from megatron.errors import CheckpointError, ConfigError
from megatron.model.transformer import Transformer
from support.families import family_spec


def unread(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} was read")


def test_rows_claim_every_tensor_of_the_model_once():
    for family in (*FAMILIES, META_LLAMA):
        spec = family_spec("llama" if family is META_LLAMA else family.name)
        ours = [row.ours for row in bound_rows(family, spec, 512)]
        assert sorted(ours) == sorted(canonical_state(Transformer(spec, device="meta")))
        theirs = [name for row in bound_rows(family, spec, 512) for name in row.theirs]
        assert len(theirs) == len(set(theirs))


def test_there_and_back_through_every_family():
    for family in (*FAMILIES, META_LLAMA):
        spec = family_spec("llama" if family is META_LLAMA else family.name)
        state = canonical_state(Transformer(spec))
        foreign = from_canonical(family, state, spec)
        again = to_canonical(family, foreign, spec)
        assert set(again) == set(state)
        assert all(torch.equal(again[name], state[name]) for name in state), family.name
        cut = from_canonical(family, state, spec, vocab_size=500)
        assert sum(tensor.shape[0] == 500 for tensor in cut.values()) == (1 if spec.tied else 2)


def test_names_must_fit_before_anything_is_read():
    family, spec = family_named("neox"), family_spec("neox")
    foreign = list(from_canonical(family, canonical_state(Transformer(spec)), spec))
    lost = LazyState({name: lambda name=name: unread(name) for name in foreign if name != "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"})
    with pytest.raises(CheckpointError, match="missing gpt_neox.layers.1.mlp.dense_h_to_4h.bias"):
        to_canonical(family, lost, spec)
    more = LazyState({name: lambda name=name: unread(name) for name in [*foreign, "gpt_neox.layers.0.adapter.weight"]})
    with pytest.raises(CheckpointError, match="claimed by no row gpt_neox.layers.0.adapter.weight"):
        to_canonical(family, more, spec)
    with pytest.raises(CheckpointError, match="missing 5.norm.bias"):
        state = canonical_state(Transformer(spec))
        from_canonical(family, {name: tensor for name, tensor in state.items() if name != "5.norm.bias"}, spec)


def test_names_of_other_versions_and_of_base_models():
    family, spec = family_named("gpt2"), family_spec("gpt2")
    state = canonical_state(Transformer(spec))
    foreign = from_canonical(family, state, spec)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in foreign.items()}
    bare |= {"h.0.attn.bias": torch.ones(1), "lm_head.weight": foreign["transformer.wte.weight"]}
    again = to_canonical(family, bare, spec)
    assert all(torch.equal(again[name], state[name]) for name in state)
    neox, spec = family_named("GPTNeoXForCausalLM"), family_spec("neox")
    foreign = dict(from_canonical(neox, canonical_state(Transformer(spec)), spec))
    foreign["lm_head.weight"] = foreign.pop("embed_out.weight")
    assert "6.final_linear.weight" in to_canonical(neox, foreign, spec)


def test_a_norm_that_nobody_uses_is_left_behind():
    """A checkpoint of GPT-NeoX may hold one that its blocks never call."""
    family, spec = family_named("olmo3"), family_spec("olmo3")
    state = canonical_state(Transformer(spec))
    foreign = from_canonical(family, {**state, "2.input_layernorm.scale": torch.ones(64)}, spec)
    assert set(foreign) == set(from_canonical(family, state, spec))
    with pytest.raises(CheckpointError, match="claimed by no row 2.input_layernorm.scale2"):
        llama = family_spec("llama")
        from_canonical(family_named("llama"), {**canonical_state(Transformer(llama)), "2.input_layernorm.scale2": torch.ones(64)}, llama)


def test_loading_checks_names_and_shapes():
    model = Transformer(family_spec("neox"))
    state = canonical_state(model)
    with pytest.raises(CheckpointError, match="missing in the checkpoint: 5.norm.bias"):
        load_canonical(model, {name: tensor for name, tensor in state.items() if name != "5.norm.bias"})
    with pytest.raises(CheckpointError, match=r"5.norm.bias: model \(64,\), checkpoint \(3,\)"):
        load_canonical(model, {**state, "5.norm.bias": torch.zeros(3)})


def test_families_by_name():
    assert family_of({"architectures": ["MistralForCausalLM"]}).name == family_of({"model_type": "mistral"}).name == "mistral"
    assert [family_named(name).name for name in ("Qwen3ForCausalLM", "meta_llama", "neox_te", "neox_legacy")] == [
        "qwen3", "meta_llama", "neox_te", "neox_legacy",
    ]  # fmt: skip
    for unknown in ("BertModel", "Qwen2MoeForCausalLM"):
        with pytest.raises(ConfigError, match=f"unknown architecture '{unknown}'"):
            family_of({"architectures": [unknown]})
