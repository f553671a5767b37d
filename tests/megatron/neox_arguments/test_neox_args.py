# SPDX-License-Identifier: Apache-2.0
"""The whole configuration: derived values, origins, views, copies."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.sections import SECTION_OF

TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "train_iters": 8,
    "train_micro_batch_size_per_gpu": 2,
    "global_num_gpus": 1,
}


def make(**extra) -> NeoXArgs:
    return NeoXArgs.from_dict({**TINY, **extra})


def test_derived_values_of_a_small_config():
    args = make()
    assert (args.run.train_batch_size, args.run.gradient_accumulation_steps, args.run.batch_size) == (2, 1, 2)
    assert args.model.precision == "fp32" and args.model.max_position_embeddings == 64
    assert args.attention.attention_config == ["global", "global"] and args.attention.num_kv_heads == 4
    assert args.attention.attention_over_documents == "joined"
    assert args.optim.lr == 0.001 and args.optim.optimizer_type == "adam" and args.optim.lr_decay_iters == 8
    assert args.optim.zero_optimization["stage"] == args.optim.zero_stage == 0
    assert args.optim.gradient_clipping == args.optim.clip_grad == 1.0
    assert args.data.data_impl == "mmap" and args.data.train_data_weights is None
    assert (args.run.do_train, args.run.do_valid, args.run.do_test) == (False, False, False)
    assert args.text.text_gen_type == "unconditional" and not args.runtime.is_pipe_parallel


def test_facts_of_existing_configs():
    args = make(
        optimizer={"type": "Adam", "params": {"lr": 6e-4, "weight_decay": 0.01}}, fp16={"enabled": True, "loss_scale": 0}, hysteresis=4
    )
    assert args.optim.lr == 6e-4 and args.optim.weight_decay == 0.01 and "weight_decay" not in args.optim.optimizer["params"]
    assert args.model.precision == "fp16" and args.optim.fp16["hysteresis"] == 4 and args.optim.dynamic_loss_scale
    assert make(optimizer={"type": "AdamW"}, lr=0.5).optim.optimizer["params"]["lr"] == 0.5
    assert make(precision="bfloat16").optim.bf16 == {"enabled": True}
    assert make(zero_stage=1, zero_reduce_bucket_size=5e7).optim.zero_optimization["reduce_bucket_size"] == 50000000
    assert make(zero_optimization={"stage": 1, "reduce_bucket_size": 5e8}).optim.zero_reduce_bucket_size == 500000000
    assert make(clip_grad=0.5).optim.gradient_clipping == 0.5
    assert make(lr_decay_fraction=0.5).optim.lr_decay_iters == 4
    assert make(pipe_parallel_size=1).runtime.is_pipe_parallel
    assert make(deepspeed_slurm=True).runtime.force_multi
    assert make(sample_input_file="p.txt").text.text_gen_type == "input-file"
    onebit = make(optimizer={"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 4}}).optim
    assert onebit.optimizer_type == "onebitadam" and onebit.scheduler["params"]["total_num_steps"] == 8


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"train_data_paths": ["a"], "train_label_data_paths": ["b"]}, "isolated"),
        ({"train_data_paths": ["a"], "train_reward_data_paths": ["b"], "pack_impl": "unpacked"}, "isolated"),
        ({"train_impl": "reinforce", "dataset_impl": "online"}, "isolated"),
        ({"train_data_paths": ["a"], "train_label_data_paths": ["b"], "attention_over_documents": "joined"}, "joined"),
        ({"train_data_paths": ["a"], "ga_dataset": "b", "ga_mode": "interleaved"}, "joined"),
    ],
)
def test_whether_documents_see_each_other(extra, expected):
    assert make(**extra).attention.attention_over_documents == expected


def test_there_is_work_only_where_there_is_data():
    run = make(data_path="a", split="90,10,0").run
    assert (run.do_train, run.do_valid, run.do_test) == (True, True, False)
    run = make(train_data_paths=["a"], valid_data_paths=["b"], eval_iters=0).run
    assert (run.do_train, run.do_valid) == (True, False)
    assert make(data_path="a", do_valid=False).run.do_valid is False


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train_micro_batch_size_per_gpu": st.integers(1, 4),
            "gradient_accumulation_steps": st.integers(1, 4),
            "global_num_gpus": st.sampled_from([4, 8]),
            "model_parallel_size": st.sampled_from([1, 2]),
            "pipe_parallel_size": st.sampled_from([0, 1, 2]),
            "precision": st.sampled_from(["fp16", "bfloat16", "fp32", None]),
            "fp16": st.sampled_from([None, {"enabled": False}]),
            "zero_stage": st.sampled_from([None, 0, 1]),
            "optimizer": st.sampled_from([None, {"type": "Lion", "params": {"lr": 0.1, "weight_decay": 0.2}}, {"type": "madgrad_wd"}]),
            "lr_decay_fraction": st.sampled_from([None, 0.3]),
            "attention_config": st.sampled_from([None, [[["global", "flash"], "all"]]]),
            "train_data_paths": st.sampled_from([None, ["a"]]),
            "hysteresis": st.integers(1, 3),
        },
    )
)
def test_a_resolved_config_resolves_to_itself(extra):
    args = make(**{"global_num_gpus": 4, **extra})
    flat = args.to_flat()
    assert set(flat) == set(SECTION_OF)
    assert NeoXArgs.from_dict(flat).to_flat() == flat
    assert NeoXArgs.from_dict(args.given()).to_flat() == flat
    assert args.replace().to_flat() == flat and pickle.loads(pickle.dumps(args)) == args


def test_replace_derives_anew():
    args = make(train_batch_size=8)
    assert args.run.gradient_accumulation_steps == 4
    assert args.replace(train_micro_batch_size_per_gpu=8).run.gradient_accumulation_steps == 1
    assert args.replace(optimizer={"type": "sgd", "params": {"lr": 2.0}}).optim.lr == 2.0
    assert args.replace(num_layers=3).attention.attention_config == ["global"] * 3
    assert args.run.gradient_accumulation_steps == 4
    with pytest.raises(ConfigError) as caught:
        args.replace(num_layer=3)
    assert caught.value.where == "replace"


def test_origins(tmp_path):
    (tmp_path / "model.yml").write_text("\n".join(f"{key}: {value}" for key, value in TINY.items()))
    (tmp_path / "opt.yml").write_text("optimizer:\n  type: Adam\n  params:\n    lr: 1e-4\nlog_interval: 5\n")
    args = NeoXArgs.from_ymls(["model", "opt.yml"], overwrites={"log-interval": 7}, conf_dir=str(tmp_path))
    assert str(args.origin("hidden-size")) == f"{tmp_path}/model.yml:2"
    assert str(args.origin("optimizer.params.lr")) == f"{tmp_path}/opt.yml:4"
    assert str(args.origin("lr")) == "derived from optimizer.params.lr"
    assert str(args.origin("log_interval")) == "--log_interval" and args.logs.log_interval == 7
    assert str(args.origin("norm")) == "default"
    assert args.origin("train_batch_size").kind == "derived"
    assert set(args.config_files) == {"model.yml", "opt.yml"}
    assert args.config_files["opt.yml"].startswith("optimizer:\n")
    with pytest.raises(ConfigError, match="not a known key"):
        args.origin("hiden_size")


def test_overwrites_win_before_anything_is_derived(tmp_path):
    (tmp_path / "m.yml").write_text("\n".join(f"{key}: {value}" for key, value in TINY.items()) + "\nbf16: {enabled: true}")
    args = NeoXArgs.from_ymls([tmp_path / "m.yml"], overwrites={"optimizer": None, "zero_optimization": None, "train_iters": 3})
    assert args.model.precision == "bfloat16" and args.optim.zero_stage == 0 and args.optim.lr_decay_iters == 3


def test_the_configuration_cannot_be_changed():
    args = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.run = None
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        args.hidden_size = 3
    args.to_flat()["optimizer"]["params"]["lr"] = 9
    assert args.optim.optimizer["params"]["lr"] == 0.001
    assert args.hidden_size == 64
    with pytest.raises(AttributeError):
        args.no_such_key  # noqa: B018


def test_data_parallel_size_and_ignored_keys():
    assert make(global_num_gpus=8, model_parallel_size=2, pipe_parallel_size=2).data_parallel_size == 2
    assert make(deepscale=True, short_seq_prob=0.1, seed=5).ignored_keys() == ("deepscale",)


def test_world_size_comes_from_the_launcher(monkeypatch):
    for name in ("DLTS_HOSTFILE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert make(global_num_gpus=None).runtime.global_num_gpus == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = make(global_num_gpus=None)
    assert args.run.train_batch_size == 8 and str(args.origin("global_num_gpus")) == "derived from WORLD_SIZE"
    assert make(global_num_gpus=2).runtime.world_size == 2


def test_the_room_is_light():
    code = "import sys, megatron.neox_arguments; print([m for m in ('torch', 'numpy', 'deepspeed', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ}, check=True)
    assert done.stdout.strip() == "[]"
