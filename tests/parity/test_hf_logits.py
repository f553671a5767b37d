# SPDX-License-Identifier: Apache-2.0
"""Tiny random Hugging Face models, their weights through a family's rows into ours: same logits, and the way back gives the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.formats.hf_files import read_state
from megatron.checkpoint.formats.neox_files import load_canonical
from megatron.checkpoint.mapping.families import family_of, hf_config, neox_keys
from megatron.checkpoint.mapping.rows import from_canonical, to_canonical
from megatron.model.build_spec import build_spec
from megatron.model.transformer import Transformer
from megatron.neox_arguments import NeoXArgs
from support.foreign import load_hf, write_model

TOLERANCE = 1e-5
RUN = {"train_micro_batch_size_per_gpu": 1, "train_iters": 1, "global_num_gpus": 1, "attention_over_documents": "joined"}

SIZE = dict(vocab_size=97, hidden_size=64, num_attention_heads=4, intermediate_size=88, max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def random_model(config: Any) -> Any:
    """A Hugging Face model in which no weight is at a trivial value."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def check(config: Any, tmp_path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Logits agree with ours, in memory and over a saved directory; our directory loads in transformers and agrees again.

    dtype: of the files; logits are computed in fp32
    """
    from transformers import AutoModelForCausalLM

    hf = random_model(config).to(dtype)
    hf.save_pretrained(tmp_path / "theirs")
    if dtype != torch.float32:  # not hf.float(): rotary frequencies would stay rounded
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.randint(0, config.vocab_size, (2, 48))
    with torch.no_grad():
        expected = hf(ids).logits
    assert expected.abs().max() > 0.5

    # into ours, from files; rows of padding make no difference to the real ones
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    family = family_of(saved)
    keys = {**neox_keys(family, saved), "padded_vocab_size": config.vocab_size + 3}
    args = NeoXArgs.from_dict({**RUN, **keys})
    spec = build_spec(args)
    model = Transformer(spec).eval()
    load_hf(tmp_path / "theirs", model, spec)
    with torch.no_grad():
        ours = model(ids).full()[..., : config.vocab_size]
    assert (ours - expected).abs().max() < TOLERANCE

    # the live model's names are the saved ones'
    again = Transformer(spec)
    load_canonical(again, to_canonical(family, hf.state_dict(), spec))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

    # and back: the same files, bit by bit
    flat, theirs = args.to_flat(), read_state(tmp_path / "theirs")
    ours_again = from_canonical(family, to_canonical(family, theirs, spec), spec, vocab_size=config.vocab_size)
    write_model(tmp_path / "ours", ours_again, hf_config(family, flat, spec, vocab_size=config.vocab_size))
    written = read_state(tmp_path / "ours")
    assert set(written) == set(theirs)
    assert all(written[name].dtype == dtype and torch.equal(written[name], theirs[name]) for name in theirs)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (back(ids).logits - expected).abs().max() < TOLERANCE
    keys = {**neox_keys(family, hf_config(family, flat, spec)), "padded_vocab_size": spec.vocab_size}
    assert build_spec(NeoXArgs.from_dict({**RUN, **keys})) == spec


@pytest.mark.timeout(180)
def test_gpt_neox(tmp_path: Path) -> None:
    """Parallel and sequential residuals, partial and whole rotary, both GELUs, tied and untied, without attention biases."""
    from transformers import GPTNeoXConfig

    size = dict(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=160, max_position_embeddings=64
    )
    cases: list[dict[str, Any]] = [
        dict(rotary_pct=0.25, use_parallel_residual=True),
        dict(rotary_pct=0.5, use_parallel_residual=False, hidden_act="gelu_new", tie_word_embeddings=True),
        dict(rotary_pct=0.25, rope_scaling=dict(rope_type="linear", factor=4.0)),
        dict(rotary_pct=1.0, rotary_emb_base=5000, hidden_act="relu", attention_bias=False, layer_norm_eps=1e-3),
    ]
    for index, case in enumerate(cases):
        check(GPTNeoXConfig(**size, **case), tmp_path / str(index))


@pytest.mark.timeout(180)
def test_gpt2(tmp_path: Path) -> None:
    """Transposed projections, learned positions, a given and a default width."""
    from transformers import GPT2Config

    for index, case in enumerate([dict(n_inner=None), dict(n_inner=96, activation_function="gelu", tie_word_embeddings=False)]):
        check(
            GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, **case),
            tmp_path / str(index),
        )


@pytest.mark.timeout(180)
def test_llama(tmp_path: Path) -> None:
    """MHA, GQA and MQA, tied and untied, with biases, and every rope scaling that Hugging Face shares with us."""
    from transformers import LlamaConfig

    size = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=88, max_position_embeddings=64)
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    cases: list[dict[str, Any]] = [
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=500000.0, rms_norm_eps=1e-5),
        dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
        dict(num_key_value_heads=2, rope_scaling=llama3),
        dict(num_key_value_heads=4, head_dim=24, mlp_bias=True, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
        dict(num_key_value_heads=2, rope_scaling=dict(rope_type="linear", factor=4.0)),
        dict(num_key_value_heads=2, rope_scaling=dict(YARN)),
        dict(num_key_value_heads=2, rope_scaling={**YARN, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0}),
    ]
    for index, case in enumerate(cases):
        check(LlamaConfig(**size, **case), tmp_path / str(index))


@pytest.mark.timeout(180)
def test_mistral(tmp_path: Path) -> None:
    """A window shorter than the row: theirs sees `sliding_window` tokens, ours sliding_window_width + 1."""
    from transformers import MistralConfig

    size = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=88)
    for index, case in enumerate([dict(sliding_window=7), dict(sliding_window=None, head_dim=24)]):
        check(MistralConfig(**size, max_position_embeddings=64, **case), tmp_path / str(index))


@pytest.mark.timeout(180)
def test_qwen2(tmp_path: Path) -> None:
    """Biases on q, k and v alone; windows in the last layers, in all, in none; tied and untied."""
    from transformers import Qwen2Config

    cases: list[dict[str, Any]] = [
        dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True),
        dict(num_key_value_heads=4, use_sliding_window=True, sliding_window=9, max_window_layers=0),
        dict(num_key_value_heads=1, sliding_window=9, rope_theta=1e6, rope_scaling=dict(YARN)),
    ]
    for index, case in enumerate(cases):
        check(Qwen2Config(**SIZE, num_hidden_layers=3, **case), tmp_path / str(index))


@pytest.mark.timeout(180)
def test_qwen3(tmp_path: Path) -> None:
    """A norm of each head, heads wider and narrower than the model, biases, windows."""
    from transformers import Qwen3Config

    cases: list[dict[str, Any]] = [
        dict(num_key_value_heads=2, head_dim=24),
        dict(num_key_value_heads=4, head_dim=8, attention_bias=True, tie_word_embeddings=True),
        dict(num_key_value_heads=1, head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    ]
    for index, case in enumerate(cases):
        check(Qwen3Config(**SIZE, num_hidden_layers=2, **case), tmp_path / str(index))


@pytest.mark.timeout(180)
def test_olmo2(tmp_path: Path) -> None:
    """Norms after the sublayers and over all queries, all keys."""
    from transformers import Olmo2Config

    cases: list[dict[str, Any]] = [
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True, rope_scaling=dict(type="linear", factor=4.0)),
    ]
    for index, case in enumerate(cases):
        check(Olmo2Config(**SIZE, num_hidden_layers=2, pad_token_id=1, eos_token_id=0, **case), tmp_path / str(index))


@pytest.mark.timeout(180)
def test_olmo3(tmp_path: Path) -> None:
    """Windows in three of four layers, whose positions are plain, with YaRN in the fourth; other lists of types."""
    from transformers import Olmo3Config

    cases: list[dict[str, Any]] = [
        dict(num_hidden_layers=5, num_key_value_heads=2, sliding_window=9, rope_scaling={**YARN, "attention_factor": 1.2}),
        dict(num_hidden_layers=2, num_key_value_heads=4, sliding_window=9, layer_types=["full_attention", "sliding_attention"]),
        dict(num_hidden_layers=2, num_key_value_heads=1, sliding_window=9, layer_types=["sliding_attention"] * 2, attention_bias=True),
        dict(num_hidden_layers=1, num_key_value_heads=2, layer_types=["full_attention"], rope_scaling=dict(YARN)),
    ]
    for index, case in enumerate(cases):
        check(Olmo3Config(**SIZE, pad_token_id=1, eos_token_id=0, **case), tmp_path / str(index))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """They stay as they are, bit by bit."""
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Olmo3Config, Qwen3Config

    gpt2 = dict(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    configs = [
        GPTNeoXConfig(**SIZE, num_hidden_layers=2),
        GPT2Config(**gpt2),
        LlamaConfig(**SIZE, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True),
        Qwen3Config(**SIZE, num_hidden_layers=2, num_key_value_heads=2, head_dim=24),
        Olmo3Config(**SIZE, num_hidden_layers=4, num_key_value_heads=2, sliding_window=9, pad_token_id=1, eos_token_id=0),
    ]
    for index, config in enumerate(configs):
        check(config, tmp_path / str(index), dtype=dtype)
