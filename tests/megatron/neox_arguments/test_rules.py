# SPDX-License-Identifier: Apache-2.0
"""Relations between keys: what good configs may do, and the list of what is not built yet."""

from __future__ import annotations

import pytest

from megatron.neox_arguments import ConfigProblems, NeoXArgs
from megatron.neox_arguments.rules import RULES
from megatron.neox_arguments.sections import SECTION_OF
from megatron.neox_arguments.unfinished import UNFINISHED, refuse_value, unfinished

TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "train_iters": 8,
    "train_micro_batch_size_per_gpu": 2,
    "global_num_gpus": 1,
}


SELECTIVE = {"checkpoint_activations": True, "checkpoint_granularity": "selective"}


def test_rules_read_keys_that_exist():
    assert {key for rule in RULES for key in rule.needs.split()} <= set(SECTION_OF)
    assert {row.key for row in UNFINISHED} <= set(SECTION_OF)


@pytest.mark.parametrize(
    "extra",
    [
        {"train_data_paths": ["a"]},  # no validation data: nothing to validate
        {"train_data_paths": ["a", "b"], "train_data_weights": [1, 0], "valid_data_paths": ["c"]},
        {"data_path": "a", "split": "100"},
        {"train_data_paths": ["a"], "train_label_data_paths": ["b"], "pack_impl": "unpacked"},
        {"attention_config": [[["flash"], "all"]]},  # without the flash-attn package
        {"attention_config": [[["mamba"], "all"]], "num_attention_heads": 3},  # no heads to divide
        {"train_iters": None, "train_epochs": 2, "data_path": "a"},
        {"precision": "bfloat16", "zero_optimization": None},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        {"global_num_gpus": 4, "model_parallel_size": 2, "pipe_parallel_size": 2},
        {"global_num_gpus": 4, "model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
        {"global_num_gpus": 2, "context_parallel_size": 2, "num_kv_heads": 1, "pos_emb": "none"},  # a ring
        {"global_num_gpus": 2, "context_parallel_size": 2, "pos_emb": "alibi", "attention_dropout": 0.1},  # heads change places with rows
        {"global_num_gpus": 2, "model_parallel_size": 2, "intermediate_size": 127, "mlp_multiple_of": 2},
        {"pipe_parallel_size": 1, "pos_emb": "rpe"},
        {"sequence_parallel": True},  # no effect
        {"num_kv_heads": 1, "attention_config": [[["global"], 1], [["flash"], 1]]},
        {"moe_num_experts": 8, "moe_top_k": 2},
        {"rope_scaling": {"type": "linear", "factor": 2}, "pos_emb": "rotary"},
        {"optimizer": {"type": "Muon", "params": {"lr": 0.02}}, "lr_decay_style": "wsd"},
        {
            "autotuning": {"enabled": True},
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": "auto"},
            "train_batch_size": 4,
        },
        {
            "train_impl": "dpo",
            "dataset_impl": "pairwise",
            "pack_impl": "unpacked",
            "pos_train_data_paths": ["a"],
            "neg_train_data_paths": ["b"],
        },
        {"train_impl": "kto", "train_data_paths": ["a"], "train_reward_data_paths": ["b"], "pack_impl": "unpacked"},
        {"train_impl": "reinforce", "dataset_impl": "online"},
        {**SELECTIVE, "zero_optimization": {"stage": 2}},
        {**SELECTIVE, "checkpoint_activations": False, "torch_compile": True, "zero_optimization": {"stage": 3}},
        {"checkpoint_activations": True, "checkpoint_in_cpu": True, "torch_compile": True, "zero_optimization": {"stage": 3}},
        {"deepspeed_extra_args": {"pipeline": {"activation_checkpoint_interval": 0}}},
    ],
)
def test_configs_that_are_good(extra):
    assert NeoXArgs.from_dict({**TINY, **extra}).run.train_batch_size


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"attention_config": [[["mamba"], "all"]]}, "attention_config"),
        ({"attention_config": [[["gmlp"], "all"]]}, "attention_config"),
        ({"moe_num_experts": 8}, "moe_num_experts"),
        ({"te_mha": True}, "te_mha"),
        ({"soft_prompt_tuning": {"enabled": True}}, "soft_prompt_tuning"),
        ({"ga_dataset": "a", "ga_mode": "interleaved"}, "ga_dataset"),
    ],
)
def test_unbuilt_features_parse_and_are_named(extra, key):
    assert key in {row.key for row in UNFINISHED}, f"{key} is built by now: delete its case here"
    found = unfinished(NeoXArgs.from_dict({**TINY, **extra}))
    assert [problem.keys for problem in found] == [(key,)]
    assert found[0].where == "from_dict" and found[0].fix


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("train_impl", "dpo", "train_impl: normal"),
        ("use_bnb_optimizer", True, "use_bnb_optimizer: false"),
        ("eval_tasks", ["piqa"], "remove eval_tasks"),
        ("text_gen_type", "precompute", "interactive"),
        ("gd_retain_dataset", "a", "remove gd_retain_dataset"),
    ],
)
def test_whoever_would_build_it_refuses_with_the_same_table(key, value, fix):
    with pytest.raises(ConfigProblems, match="not built yet") as told:
        refuse_value(key, value)
    assert told.value.where == key and fix in (told.value.fix or "")


@pytest.mark.parametrize(("key", "value"), [("train_impl", "normal"), ("text_gen_type", "input-file"), ("eval_tasks", None), ("lr", 1.0)])
def test_what_is_built_is_not_refused(key, value):
    refuse_value(key, value)


def test_a_plain_model_asks_for_nothing_unbuilt():
    assert unfinished(NeoXArgs.from_dict(TINY)) == []
    assert unfinished(NeoXArgs.from_dict({**TINY, "soft_prompt_tuning": {"enabled": False}, "attention_config": ["flash", "global"]})) == []


@pytest.mark.parametrize(
    ("extra", "keys"),
    [
        ({"num_layers": None, "hidden_size": None}, {"num_layers", "hidden_size"}),
        ({"train_micro_batch_size_per_gpu": None}, {"train_batch_size"}),
        ({"zero_optimization": {"stage": 3}, "attention_config": [[["rwkv"], "all"]]}, {"attention_config"}),
        ({"moe_num_experts": 4, "zero_optimization": {"stage": 2}}, {"moe_num_experts"}),
        ({"gd_mode": True}, {"ga_dataset", "gd_retain_dataset"}),
        ({"pos_train_data_paths": ["a"]}, {"neg_train_data_paths"}),
        ({"include": "a", "exclude": "b"}, {"include"}),
        ({**SELECTIVE, "zero_optimization": {"stage": 3}}, {"checkpoint_granularity", "zero_optimization.stage"}),
        ({**SELECTIVE, "torch_compile": True}, {"checkpoint_granularity", "torch_compile"}),
        ({**SELECTIVE, "checkpoint_in_cpu": True}, {"checkpoint_granularity", "checkpoint_in_cpu"}),
        ({**SELECTIVE, "activation_checkpointing": {"partition_activations": True}}, {"partition_activations"}),
        (
            {"deepspeed_extra_args": {"activation_checkpointing": {"cpu_checkpointing": True}}},
            {"deepspeed_extra_args.activation_checkpointing"},
        ),
        (
            {"deepspeed_extra_args": {"pipeline": {"activation_checkpoint_interval": 2}}},
            {"deepspeed_extra_args.pipeline.activation_checkpoint_interval"},
        ),
    ],
)
def test_missing_and_clashing_keys_are_named(extra, keys):
    with pytest.raises(ConfigProblems) as caught:
        NeoXArgs.from_dict({**TINY, **extra})
    assert keys <= {key for problem in caught.value.problems for key in problem.keys}


@pytest.mark.forked  # asks the model, which needs torch
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sequences_are_refused_where_the_model_could_not_cut_them(sequence_parallel):
    """The rule and `mpu.context`, which do not know each other, choose the same form and the same lengths."""
    from megatron.errors import ConfigError
    from megatron.mpu.context import ContextKind, ContextPlan
    from megatron.mpu.groups import Group
    from megatron.neox_arguments.rules.model import is_ring

    seen = set()
    for heads, kv_heads, tensor, context in ((8, 8, 1, 2), (8, 2, 2, 2), (8, 4, 2, 2), (12, 12, 2, 3), (12, 4, 2, 4), (8, 8, 2, 3)):
        sizes = {"num_attention_heads": heads, "num_kv_heads": kv_heads, "model_parallel_size": tensor, "context_parallel_size": context}
        plan = ContextPlan.choose(Group(0, context), heads=heads // tensor, kv_heads=kv_heads // tensor)
        assert is_ring(sizes) == (plan.kind is ContextKind.RING)
        for length in range(24, 49):
            try:
                rows = sum(map(len, plan.runs(length)))
                possible = not sequence_parallel or rows % tensor == 0
            except ConfigError:
                possible = False
            flat = {**TINY, **sizes, "hidden_size": 96, "global_num_gpus": tensor * context, "seq_length": length}
            seen.add((plan.kind, possible))
            if possible:
                NeoXArgs.from_dict({**flat, "sequence_parallel": sequence_parallel})
            else:
                with pytest.raises(ConfigProblems, match="cannot be cut into equal parts"):
                    NeoXArgs.from_dict({**flat, "sequence_parallel": sequence_parallel})
    assert len(seen) == 4
