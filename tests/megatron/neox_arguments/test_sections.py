# SPDX-License-Identifier: Apache-2.0
"""Every public key exists, once, with its default, a sentence and a type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron.neox_arguments.sections import SECTION_OF, SECTIONS, allowed

FACTS = json.loads((Path(__file__).parents[2] / "golden" / "config" / "keys.json").read_text())
# Where our default is another: the step count is solved for; the commit is read when a config is resolved.
CHANGED = {"gradient_accumulation_steps": None, "git_hash": None}
OURS = {
    "attention_over_documents", "attention_backend", "rope_scaling", "sliding_window_pattern", "intermediate_size_convention",
    "logits_block_rows", "wsd_decay_fraction", "warmup_from_zero", "torch_compile", "index_map_dir", "exit_duration_in_mins",
    "exit_margin_in_secs", "grace_in_secs",
    "mup_base_hidden_size", "checkpoint_granularity", "context_parallel_size", "summed_bias_full_lr",
    "heartbeat_interval_in_secs", "hang_timeout_in_mins", "allow_data_change",
    "checkpoint_verify", "keep_every", "checkpoint_async", "checkpoint_failures_allowed",
    "replica_check_interval", "save_hf",
    "nonfinite_policy", "nonfinite_limit", "rollback_limit", "loss_spike_factor", "loss_spike_window", "loss_spike_patience",
    "loss_spike_policy",
    "head_dim", "use_bias_in_attn_output", "qk_norm_each_head", "rope_scaling_layers",
}  # fmt: skip


def field(key):
    return SECTIONS[SECTION_OF[key]].model_fields[key]


def test_all_public_keys_are_there_with_their_defaults():
    assert len(FACTS) == 338
    assert set(FACTS) <= set(SECTION_OF)
    assert {key: field(key).default for key in FACTS} == {**FACTS, **CHANGED}


def test_no_name_is_in_two_sections_and_new_names_are_known():
    assert sum(len(section.model_fields) for section in SECTIONS.values()) == len(SECTION_OF)
    assert set(SECTION_OF) - set(FACTS) >= OURS


def test_every_key_has_a_sentence_and_a_type_in_words():
    for key in SECTION_OF:
        text = field(key).description or ""
        assert text.endswith(".") and len(text) > 15 and text.isascii(), key
        words = allowed(field(key))
        assert not any(sign in words for sign in ("typing", "<class", "Annotated", "Literal")), (key, words)


def test_allowed_in_words():
    assert allowed(field("rotary_pct")) == "a number > 0 and <= 1"
    assert allowed(field("num_layers")) == "a whole number >= 1, or null"
    assert allowed(field("te_fp8_format")) == "one of e4m3, hybrid"
    assert allowed(field("weight_server_port")) == "a whole number, or a list of whole numbers"
    assert allowed(field("extra_save_iters")) == "a list of whole numbers, or null"


@pytest.mark.parametrize(
    ("section", "key", "given", "kept"),
    [
        ("model", "activation", "GeLU", "gelu"),
        ("model", "activation", "SWIGLU", "swiglu"),
        ("data", "tokenizer_type", "hftokenizer", "HFTokenizer"),
        ("attention", "pos_emb", "None", "none"),
        ("checkpoint", "load", "None", None),
        ("checkpoint", "checkpoint_verify", False, "off"),
        ("model", "hidden_dropout", 0, 0.0),
        ("attention", "rotary_emb_base", 500000.0, 500000.0),
        ("attention", "sliding_window_pattern", [4095, None], [4095, None]),
        ("optim", "zero_reduce_bucket_size", 5e8, 500000000),
        ("optim", "communication_data_type", "FP32", "fp32"),
        ("data", "online_dataserver_ips", ["a", "b"], ["a", "b"]),
        ("data", "online_dataserver_ports", [1, 2], [1, 2]),
        ("objective", "weight_server_port", [6000, 6001], [6000, 6001]),
        ("checkpoint", "checkpoint_factor", 1.5, 1.5),
    ],
)
def test_values_that_are_accepted(section, key, given, kept):
    found = getattr(SECTIONS[section](**{key: given}), key)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"num_layers": True}),
        ("model", {"num_layers": "4"}),
        ("model", {"hidden_dropout": True}),
        ("model", {"hidden_dropout": float("nan")}),
        ("model", {"gpt_j_residual": 1}),
        ("data", {"train_data_paths": "a"}),
        ("data", {"train_data_weights": ["1"]}),
        ("model", {"no_such_key": 1}),
    ],
)
def test_values_that_are_refused(section, values):
    with pytest.raises(ValidationError):
        SECTIONS[section](**values)


def test_sections_are_frozen():
    with pytest.raises(ValidationError):
        SECTIONS["model"]().num_layers = 3
