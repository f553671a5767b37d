# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder against a configuration: what differs is named, and the printed configuration fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.checkpoint.build import Take, choose_source, hf_spec, opened
from megatron.checkpoint.loading.hf_view import HFAddress, HFModel, fetch, is_hf, parse, ready_yaml
from megatron.checkpoint.mapping.families import FAMILIES
from megatron.checkpoint.mapping.rows import Family
from megatron.errors import CheckpointError, ConfigError
from megatron.mpu.groups import Group
from megatron.neox_arguments import NeoXArgs
from support.hf import SIZES, fitting

CONFIGS: dict[str, dict[str, Any]] = {
    "neox": {"architectures": ["GPTNeoXForCausalLM"], "intermediate_size": 256, "hidden_act": "gelu", "rotary_pct": 0.25},
    "llama": {
        "architectures": ["LlamaForCausalLM"], "intermediate_size": 128, "num_key_value_heads": 2, "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


def folder(kind: str, place: Path, **changes: Any) -> Path:
    """config.json alone."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps({**SIZES, **CONFIGS[kind], **changes}))
    return place


def args_of(kind: str, place: Path, **changes: Any) -> NeoXArgs:
    return NeoXArgs.from_dict(fitting(kind, place, **{"padded_vocab_size": 512, **changes}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_describes_the_model_is_taken(kind: str, tmp_path: Path) -> None:
    """Also with more rows, another length, and dropout of its own."""
    model = HFModel.open(folder(kind, tmp_path))
    assert hf_spec(args_of(kind, tmp_path), model).vocab_size == 512
    free = {"padded_vocab_size": 640, "seq_length": 32, "max_position_embeddings": 32}
    if kind == "llama":
        free["intermediate_size_convention"] = "auto"
        # As many key heads as heads, which either side may leave unsaid.
        for theirs, ours in ((None, 4), (4, None)):
            plain = HFModel.open(folder(kind, tmp_path / "mha", num_key_value_heads=theirs))
            assert hf_spec(args_of(kind, tmp_path, num_kv_heads=ours), plain).blocks[0].attention.num_kv_heads == 4
    assert hf_spec(args_of(kind, tmp_path, hidden_dropout=0.1, **free), model).vocab_size == 640


def test_every_difference_is_named_with_both_values(tmp_path: Path) -> None:
    model = HFModel.open(folder("llama", tmp_path, rope_theta=500000.0, attention_bias=True))
    wrong = {
        "num_layers": 3,
        "attention_config": None,
        "num_kv_heads": 4,
        "intermediate_size": 96,
        "norm": "layernorm",
        "padded_vocab_size": 384,
    }
    with pytest.raises(ConfigError) as caught:
        hf_spec(args_of("llama", tmp_path, **wrong), model)
    told = caught.value.report()
    for line in (
        "num_layers: 3 here, 2 in the model; set num_layers: 2",
        "num_kv_heads: 4 here, 2 in the model",
        "intermediate_size: 96 here, 128 in the model",
        "rotary_emb_base: 10000 here, 500000",
        "use_bias_in_attn_linear: false here, true in the model",
        "padded_vocab_size: 384 here, 512 in the model; set padded_vocab_size: at least 512",
        "norm: layernorm here, rmsnorm in the model; set norm: rmsnorm",
        "tools/ckpts/hf_config.py",
    ):
        assert line in told, told
    assert "num_attention_heads" not in told and "seq_length" not in told


def test_learned_positions_are_part_of_the_model(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": "gelu_new"}))
    model = HFModel.open(tmp_path)
    hf_spec(args_of("gpt2", tmp_path, bias_gelu_fusion=True), model)
    with pytest.raises(ConfigError, match="max_position_embeddings: 32 here, 64 in the model"):
        hf_spec(args_of("gpt2", tmp_path, bias_gelu_fusion=True, seq_length=32, max_position_embeddings=32), model)
    with pytest.raises(ConfigError, match="bias_gelu_fusion: false here, true in the model"):
        hf_spec(args_of("gpt2", tmp_path), model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_printed_configuration_fits(kind: str, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    odd = {"rope_theta": 500000.0, "rope_scaling": scaling} if kind == "llama" else {"use_parallel_residual": False}
    model = HFModel.open(folder(kind, tmp_path, torch_dtype="bfloat16", **odd))
    (tmp_path / "tokenizer.json").write_text("{}")
    keys = yaml.safe_load(ready_yaml(model, f"hf:{tmp_path}"))
    assert keys["precision"] == "bfloat16" and keys["vocab_file"] == str(tmp_path) and is_hf(keys["load"])
    run = {"train_micro_batch_size_per_gpu": 1, "train_iters": 1, "global_num_gpus": 1}
    assert hf_spec(NeoXArgs.from_dict({**run, **keys}), model).num_layers == 2


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_reads_its_own_configuration(family: Family, tmp_path: Path) -> None:
    """As transformers writes it with its defaults: the printed keys fit, and one that is changed is named."""
    from transformers import AutoConfig

    sizes = {**SIZES, "max_position_embeddings": 64}
    config = AutoConfig.for_model(family.model_type, **{key: value for key, value in sizes.items() if key != "attn_implementation"})
    saved = {**config.to_dict(), "architectures": [family.hf]}
    for name in ("intermediate_size", "num_key_value_heads", "head_dim"):
        if saved.get(name) is not None:
            saved[name] = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    model = HFModel.open(tmp_path)
    run = {"train_micro_batch_size_per_gpu": 1, "train_iters": 1, "global_num_gpus": 1}
    keys = {**run, **yaml.safe_load(ready_yaml(model, f"hf:{tmp_path}"))}
    hf_spec(NeoXArgs.from_dict(keys), model)
    with pytest.raises(ConfigError, match="no_weight_tying"):
        hf_spec(NeoXArgs.from_dict({**keys, "no_weight_tying": not keys["no_weight_tying"]}), model)


def test_what_is_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="there is no folder /nowhere/at/all"):
        fetch("hf:/nowhere/at/all")
    with pytest.raises(CheckpointError, match="there is no folder owner/never-heard-of"):
        fetch("hf:owner/never-heard-of")
    with pytest.raises(CheckpointError, match=r"there is no folder \(nothing\)"):
        fetch("hf:")
    with pytest.raises(CheckpointError, match="config.json is missing"):
        HFModel.open(tmp_path)
    with pytest.raises(CheckpointError, match="a folder has no revisions"):
        fetch(f"hf:{tmp_path}@main")
    folder("neox", tmp_path, architectures=["BertModel"])
    with pytest.raises(ConfigError, match="unknown architecture 'BertModel'") as caught:
        HFModel.open(tmp_path)
    assert "config.json" in str(caught.value) and "LlamaForCausalLM" in str(caught.value)
    source = choose_source(args_of("neox", folder("neox", tmp_path)))
    assert source.take is Take.WEIGHTS and source.folder is None
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        opened(args_of("neox", tmp_path), source, Group.single())


def test_addresses() -> None:
    assert parse("hf:EleutherAI/pythia-70m@step3000") == HFAddress(name="EleutherAI/pythia-70m", revision="step3000")
    assert parse("hf:gpt2") == HFAddress(name="gpt2")
    assert not is_hf("out/run") and not is_hf(None) and is_hf("hf:gpt2")


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    folder("neox", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first, sizes = fetch(f"hf:{tmp_path}"), fetch(f"hf:{tmp_path}", contents=False)
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert fetch(f"hf:{tmp_path}").digest != first.digest and first.digest.startswith("xxh128:")
    assert fetch(f"hf:{tmp_path}", contents=False) == sizes


def test_a_model_of_the_hub_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that was found first is what every rank reads."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder("neox", tmp_path / commit)
    asked: list[tuple[str, str | None, bool]] = []

    def snapshot(name: str, *, revision: str | None, local_files_only: bool, **patterns: Any) -> str:
        assert "*.safetensors" in patterns["allow_patterns"]
        asked.append((name, revision, local_files_only))
        return str(tmp_path / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = fetch("hf:owner/model@main")
    assert found.revision == commit and found.directory == tmp_path / commit
    assert asked == [("owner/model", "main", False), ("owner/model", commit, True)]
    assert found.told()["revision"] == commit
