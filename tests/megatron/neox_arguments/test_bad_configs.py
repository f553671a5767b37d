# SPDX-License-Identifier: Apache-2.0
"""Configs that must be refused: one report with file:line, reason and fix, exit status 77."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron.errors import ConfigError
from megatron.neox_arguments import ConfigProblems, NeoXArgs

ROOT = Path(__file__).resolve().parents[3]
BASE = """\
num_layers: 4
hidden_size: 64
num_attention_heads: 4
seq_length: 128
max_position_embeddings: 128
pos_emb: rotary
global_num_gpus: 1
train_micro_batch_size_per_gpu: 4
train_iters: 10
optimizer: {type: Adam, params: {lr: 1e-3}}
"""


class Bad(NamedTuple):
    """text: lines of bad.yml, which stand beside those of BASE they do not replace; line: where the fault is."""

    name: str
    text: str
    line: int
    says: str
    fix: str


CASES = (
    Bad("unknown key", "hiden_size: 64", 1, "hiden_size is not a known key", "hidden_size"),
    Bad("unknown key with hyphens", "\n\ncheckpoint-factr: 5", 3, "checkpoint_factr is not a known key", "checkpoint_factor"),
    Bad("name of an older version", "gas: 2", 1, "closest: gradient_accumulation_steps", "write gradient_accumulation_steps"),
    Bad("number as string", 'hidden_dropout: "0.1"', 1, "hidden_dropout is '0.1'", "without quotes"),
    Bad("word for number", "num_layers: four", 1, "num_layers is 'four'", "write a whole number >= 1"),
    Bad("fraction for int", "num_layers: 2.5", 1, "a whole number >= 1", "write a whole number >= 1"),
    Bad("bool for int", "num_layers: true", 1, "num_layers is true", "write a number"),
    Bad("string for bool", 'gpt_j_residual: "true"', 1, "true or false", "without quotes"),
    Bad("below bound", "log_interval: 0", 1, "a whole number >= 1", "write a whole number >= 1"),
    Bad("above bound", "rotary_pct: 1.5", 1, "> 0 and <= 1", "write a number > 0 and <= 1"),
    Bad("not a number", "min_lr: .nan", 1, "min_lr is nan", "write a number >= 0"),
    Bad("unknown choice", "activation: swigloo", 1, "closest: swiglu", "write swiglu"),
    Bad("choice far from all", "norm: batch", 1, "one of layernorm", "write one of layernorm"),
    Bad("string for list", "train_data_paths: a", 1, "a list of strings", "write a list: [a]"),
    Bad("wrong list entry", "train_data_paths: [a, 7]", 1, "entry 2, 7, does not fit", "write a list of strings"),
    Bad("number for name", "wandb_run_name: 17", 1, "a string", 'put it in quotes: "17"'),
    Bad("run-time object", "tokenizer: mine", 1, "filled in at run time", "remove it"),
    Bad("null where a value is needed", "norm: null", 1, "norm is null", "leave the key out"),
    Bad("yaml bracket", "data_path: [a\nsplit: b", 2, "not valid YAML", "close every bracket"),
    Bad("yaml tab", "fp16:\n\tenabled: true", 2, "not valid YAML", "spaces, not tabs"),
    Bad("yaml colon", "wandb_group: a: b", 1, "not valid YAML", "quote values"),
    Bad("not a mapping", "- num_layers: 2", 1, "`key: value` pairs", "key: value"),
    Bad("two documents", "seed: 1\n---\nseed: 2", 2, "another document", "remove the `---` line"),
    Bad("twice in one file", "seed: 1\nlog-interval: 1\nlog_interval: 2", 3, "log_interval is set twice", "keep one"),
    Bad("twice in a block", "optimizer:\n  type: Adam\n  params:\n    lr: 1\n    lr: 2", 5, "optimizer.params.lr is set twice", "keep one"),
    Bad(
        "unknown ZeRO entry",
        "zero_optimization:\n  stage: 1\n  reduce_buckt_size: 5e8",
        3,
        "reduce_buckt_size is not a known",
        "reduce_bucket_size",
    ),
    Bad("ZeRO stage", "zero_optimization: {stage: 4}", 1, "zero_optimization.stage is 4", "choose a stage"),
    Bad("ZeRO without stage", "zero_optimization: {overlap_comm: true}", 1, "lacks `stage`", "add stage"),
    Bad(
        "offload without ZeRO 3", "zero_optimization:\n  stage: 1\n  offload_param: {device: cpu}", 3, "needs ZeRO stage 3", "set stage: 3"
    ),
    Bad(
        "ZeRO copy contradicts",
        "zero_stage: 2\nzero_optimization: {stage: 1}",
        1,
        "zero_stage is 2, but zero_optimization.stage is 1",
        "one of the two",
    ),
    Bad(
        "pipeline with ZeRO 2",
        "pipe_parallel_size: 1\nzero_optimization: {stage: 2}",
        1,
        "does not work with ZeRO stage 2",
        "pipe_parallel_size: 0",
    ),
    Bad("SM3 under ZeRO", "optimizer: {type: SM3}\nzero_optimization: {stage: 1}", 1, "but ZeRO hands it flat pieces", "stage: 0"),
    Bad("SM3 in bfloat16", "optimizer: {type: SM3}\nprecision: bfloat16", 1, "but bfloat16 hands it flat pieces", "precision: fp32"),
    Bad(
        "SM3 over tensor ranks",
        "optimizer: {type: SM3}\nmodel_parallel_size: 2\nglobal_num_gpus: 2",
        1,
        "2 tensor-parallel ranks hold parts",
        "model_parallel_size: 1",
    ),
    Bad(
        "Muon over tensor ranks",
        "optimizer: {type: Muon}\nmodel_parallel_size: 2\nglobal_num_gpus: 2",
        1,
        "2 tensor-parallel ranks hold slices",
        "model_parallel_size: 1",
    ),
    Bad("Muon in fp16", "precision: fp16\noptimizer: {type: Muon}", 1, "muon does not run in fp16", "bfloat16 or fp32"),
    Bad(
        "Muon under ZeRO 3",
        "gradient_clipping: 0.0\nzero_optimization: {stage: 3}\noptimizer: {type: Muon}",
        3,
        "reduce_scatter is on",
        "reduce_scatter: false",
    ),
    Bad(
        "Muon with offload",
        "gradient_clipping: 0.0\nzero_optimization: {stage: 1, offload_optimizer: {device: cpu}}\noptimizer: {type: Muon}",
        3,
        "does not work with zero_optimization.offload_optimizer",
        "remove offload_optimizer",
    ),
    Bad(
        "Muon clipped under ZeRO",
        "zero_optimization: {stage: 1}\noptimizer: {type: Muon}",
        2,
        "every step would be cut",
        "gradient_clipping: 0.0",
    ),
    Bad(
        "Muon's numbers under ZeRO",
        "gradient_clipping: 0.0\nprecision: bfloat16\noptimizer:\n  type: Muon\n  params: {ns_steps: 6}",
        5,
        "with ns_steps 5",
        "remove optimizer.params.ns_steps",
    ),
    Bad("no bucket in the place of copies", "save: out\ncheckpoint_factor: 5\ns3_path: s3:///runs", 3, "s3:///runs", "s3://bucket/prefix"),
    Bad("copies of no checkpoints", "s3_path: s3://bucket/runs", 1, "save is not set", "set save"),
    Bad("muP without a base", "use_mup: true", 1, "mup_base_hidden_size is not set", "add mup_base_hidden_size"),
    Bad(
        "muP with MADGRAD",
        "use_mup: true\nmup_base_hidden_size: 32\noptimizer: {type: madgrad_wd}",
        3,
        "no law for the learning rate of madgrad_wd",
        "such as adam",
    ),
    Bad(
        "muP with orthogonal embeddings",
        "use_mup: true\nmup_base_hidden_size: 32\ninit_method: orthogonal",
        3,
        "those of init_method orthogonal",
        "init_method: normal",
    ),
    Bad(
        "muP with relative positions",
        "use_mup: true\nmup_base_hidden_size: 32\npos_emb: rpe",
        3,
        "grows with the head size",
        "another pos_emb",
    ),
    Bad("coordinate check in a config", "coord_check: true", 1, "a command of its own", "tools/mup/coord_check.py"),
    Bad("optimizer without type", "optimizer: {params: {lr: 1e-3}}", 1, "optimizer lacks `type`", "add `type`"),
    Bad("unknown optimizer", "optimizer: {type: Adm, params: {lr: 1e-3}}", 1, "closest: adam", "write adam"),
    Bad("unknown optimizer entry", "optimizer: {type: sgd, params: {lr: 1e-3, betas: [0.9, 0.9]}}", 1, "of optimizer sgd", "remove it"),
    Bad("betas", "optimizer:\n  type: Adam\n  params: {betas: [0.9, 1.2]}", 3, "two numbers", "change the value"),
    Bad("lr as string", "optimizer:\n  type: Adam\n  params:\n    lr: '1e-4'", 4, "optimizer.params.lr is '1e-4'", "without quotes"),
    Bad("negative lr", "optimizer: {type: Adam, params: {lr: -0.1}}", 1, "lr is -0.1", "write a number >= 0"),
    Bad(
        "lr contradicts",
        "lr: 0.5\noptimizer:\n  type: Adam\n  params: {lr: 1e-3}",
        4,
        "lr is 0.5, but optimizer.params.lr is 0.001",
        "one of the two",
    ),
    Bad("type contradicts", "optimizer_type: sgd\noptimizer: {type: Adam}", 1, "optimizer_type is 'sgd'", "one of the two"),
    Bad(
        "decay contradicts",
        "weight_decay: 0.1\noptimizer: {type: Adam, params: {weight_decay: 0}}",
        1,
        "weight_decay is 0.1",
        "one of the two",
    ),
    Bad("clipping contradicts", "clip_grad: 0.5\ngradient_clipping: 1.0", 2, "clip_grad is 0.5", "one of the two"),
    Bad("min_lr above lr", "min_lr: 0.01", 1, "min_lr 0.01 is greater than the learning rate 0.001", "lower min_lr"),
    Bad("both schedules", "override_lr_scheduler: true\nuse_checkpoint_lr_scheduler: true", 2, "exclude each other", "keep one"),
    Bad("decay twice", "lr_decay_iters: 7\nlr_decay_fraction: 0.5", 1, "lr_decay_fraction 0.5 of train_iters is 5", "one of the two"),
    Bad("precision contradicts", "precision: fp16\nbf16: {enabled: true}", 2, "bf16.enabled says bfloat16", "keep one"),
    Bad("fp16 without enabled", "fp16: {loss_scale: 0}", 1, "fp16 lacks `enabled`", "add `enabled`"),
    Bad("fp16 loss in fp32", "fp16_lm_cross_entropy: true", 1, "needs precision fp16", "remove"),
    Bad("batch of three", "train_batch_size: 9\ngradient_accumulation_steps: 2", 1, "9 is not", "leave one of the three out"),
    Bad(
        "batch without solution",
        "train_batch_size: 6",
        1,
        "6 / (train_micro_batch_size_per_gpu 4 * 1 data-parallel ranks = 4) = 1.5",
        "multiple of 4",
    ),
    Bad("ranks not shared out", "model_parallel_size: 2", 1, "1 / 2 data-parallel ranks is not whole", "multiple of 2"),
    Bad("heads", "num_attention_heads: 5", 1, "num_attention_heads 5 does not divide hidden_size 64", "set num_attention_heads to 4"),
    Bad("kv heads", "num_kv_heads: 3", 1, "num_kv_heads 3 does not divide num_attention_heads 4", "set num_kv_heads to 2"),
    Bad(
        "sequence for context ranks",
        "global_num_gpus: 2\ncontext_parallel_size: 2\nseq_length: 127",
        3,
        "cannot be cut into equal parts for context_parallel_size 2",
        "set seq_length to 128",
    ),
    Bad(
        "sequence for a ring",
        "global_num_gpus: 2\ncontext_parallel_size: 2\nnum_kv_heads: 1\nseq_length: 126",
        4,
        "context_parallel_size 2 with ring attention",
        "set seq_length to 128",
    ),
    Bad(
        "sequence for context and tensor ranks",
        "global_num_gpus: 4\ncontext_parallel_size: 2\nmodel_parallel_size: 2\nsequence_parallel: true\nseq_length: 126",
        5,
        "shared by model_parallel_size 2 for sequence_parallel",
        "set seq_length to 128",
    ),
    Bad(
        "sequence for tensor ranks",
        "global_num_gpus: 2\nmodel_parallel_size: 2\nsequence_parallel: true\nseq_length: 127",
        2,
        "model_parallel_size 2 does not divide seq_length 127",
        "seq_length to a multiple of 2",
    ),
    Bad(
        "ring with a bias",
        "global_num_gpus: 2\ncontext_parallel_size: 2\nnum_kv_heads: 1\npos_emb: alibi",
        2,
        "ring attention has no bias on the scores (pos_emb alibi)",
        "choose a context_parallel_size",
    ),
    Bad(
        "ring with dropout",
        "global_num_gpus: 2\ncontext_parallel_size: 2\nnum_kv_heads: 1\nattention_dropout: 0.1",
        2,
        "ring attention has no dropout (attention_dropout 0.1)",
        "choose a context_parallel_size",
    ),
    Bad(
        "ring by one back end",
        "global_num_gpus: 2\ncontext_parallel_size: 2\nnum_kv_heads: 1\nattention_backend: sdpa",
        2,
        "no choice of attention_backend (sdpa)",
        "choose a context_parallel_size",
    ),
    Bad(
        "kv heads for tensor ranks",
        "global_num_gpus: 2\nmodel_parallel_size: 2\nnum_kv_heads: 1",
        2,
        "2 does not divide num_kv_heads 1",
        "1",
    ),
    Bad(
        "width for tensor ranks",
        "global_num_gpus: 2\nmodel_parallel_size: 2\nintermediate_size: 127",
        2,
        "2 does not divide the width of the MLP, 127",
        "mlp_multiple_of",
    ),
    Bad(
        "gated width for tensor ranks",
        "global_num_gpus: 2\nmodel_parallel_size: 2\nactivation: swiglu\nintermediate_size: 127\nmlp_multiple_of: 2",
        2,
        "2 does not divide the width of the MLP, 127",
        "or intermediate_size so that the width is one",
    ),
    Bad(
        "no layer of a stage",
        "pipe_parallel_size: 1\npipe_partition_method: type:conv",
        2,
        "finds 0 layers for 1 stages",
        "type:transformer",
    ),
    Bad(
        "unknown partition", "pipe_parallel_size: 1\npipe_partition_method: even", 2, "pipe_partition_method is 'even'", "type:transformer"
    ),
    Bad("broken partition", "pipe_parallel_size: 1\npipe_partition_method: 'type:('", 2, "finds 0 layers", "type:transformer"),
    Bad(
        "SuperOffload at stage 2",
        "zero_optimization:\n  stage: 2\n  offload_optimizer: {device: cpu, super_offload: true}",
        3,
        "super_offload works with ZeRO stage 3",
        "set stage: 3",
    ),
    Bad(
        "SuperOffload with SGD",
        "optimizer: {type: SGD}\nzero_optimization:\n  stage: 3\n  offload_optimizer: {device: cpu, super_offload: true}",
        4,
        "an Adam of its own on the host",
        "optimizer.type: adam",
    ),
    Bad(
        "noise scale of stages",
        "global_num_gpus: 2\npipe_parallel_size: 2\nlog_gradient_noise_scale: true\ngradient_accumulation_steps: 2",
        3,
        "needs the gradient of a micro batch on one rank",
        "set these sizes to 1",
    ),
    Bad(
        "vocabulary for tensor ranks",
        "global_num_gpus: 2\nmodel_parallel_size: 2\npadded_vocab_size: 501",
        2,
        "2 does not divide padded_vocab_size 501",
        "multiple of 2",
    ),
    Bad("stages", "global_num_gpus: 5\npipe_parallel_size: 5", 2, "pipe_parallel_size 5 is greater than num_layers 4", "at most 4"),
    Bad(
        "position table on two stages",
        "global_num_gpus: 2\npipe_parallel_size: 2\npos_emb: rpe",
        2,
        "shared by all layers",
        "another pos_emb",
    ),
    Bad("rotary pairs", "rotary_pct: 0.2", 1, "rotates 3 of 16 features", "rotary_pct to 0.25"),
    Bad("rope scaling type", "rope_scaling: {rope_type: yarm, factor: 4}", 1, "rope_scaling.rope_type is 'yarm'", "write yarn"),
    Bad(
        "rope scaling entry",
        "rope_scaling:\n  rope_type: llama3\n  factor: 8",
        1,
        "lacks low_freq_factor, high_freq_factor",
        "add low_freq_factor",
    ),
    Bad("sequence too long", "seq_length: 256", 1, "seq_length 256 is greater than max_position_embeddings 128", "256"),
    Bad("layer type", "attention_config: [[[globl], all]]", 1, "layer type 'globl'", "write global"),
    Bad("layer count", "attention_config: [[[global], 3]]", 1, "describes 3 layers, num_layers is 4", "add up"),
    Bad("layer pattern", "num_layers: 5\nattention_config: [[[global, flash], all]]", 2, "5 / 2 is not whole", "num_layers"),
    Bad("layer form", "attention_config: [[global], 4]", 1, "not [[type, ...], repeats]", '[[["global"], 12]]'),
    Bad("separate norms", "use_separate_qk_norms: true", 1, "does nothing without use_qk_layernorm", "use_qk_layernorm: true"),
    Bad("norm of each head", "qk_norm_each_head: true", 1, "does nothing without use_separate_qk_norms", "use_separate_qk_norms: true"),
    Bad("two widths", "intermediate_size: 128\nexpansion_factor: 2", 2, "both set the width", "keep one"),
    Bad("two data sources", "data_path: a\ntrain_data_paths: [b]", 2, "two ways to name the data", "keep data_path"),
    Bad(
        "label count",
        "train_data_paths: [a, b]\ntrain_label_data_paths: [c]",
        2,
        "has 1 entries, train_data_paths has 2",
        "one entry per prefix",
    ),
    Bad("labels of nothing", "train_label_data_paths: [c]", 1, "train_data_paths is not", "add train_data_paths"),
    Bad("weight count", "train_data_paths: [a, b]\ntrain_data_weights: [1.0]", 2, "has 1 entries", "one entry per prefix"),
    Bad("split", "data_path: a\nsplit: most, some", 2, "split is 'most, some'", "correct the numbers"),
    Bad("no length", "train_iters: null", 1, "the length of training is not set", "train_iters: N"),
    Bad("two lengths", "train_epochs: 1", 1, "both set the length", "keep one"),
    Bad("epochs unpacked", "train_iters: null\ntrain_epochs: 1\npack_impl: unpacked", 3, "pack_impl is unpacked", "use train_iters"),
    Bad("dpo without pairs", "train_impl: dpo", 1, "learns from pairwise data", "dataset_impl: pairwise"),
    Bad(
        "kto micro batch",
        "train_impl: kto\ntrain_data_paths: [a]\ntrain_reward_data_paths: [r]\npack_impl: unpacked\ntrain_micro_batch_size_per_gpu: 1",
        5,
        "which has 1",
        "raise",
    ),  # fmt: skip
    Bad("ascent without interval", "ga_dataset: a\nga_iters: 2", 0, "ga_mode interval needs ga_interval", "add ga_interval"),
    Bad("save when", "save: out", 1, "nothing says when to save", "checkpoint_factor"),
    Bad("checkpoint spacing", "save: out\ncheckpoint_factor: 0.5", 2, "checkpoint_factor is 0.5", "number of steps"),
    Bad("hang timeout below 0", "hang_timeout_in_mins: -1", 1, "hang_timeout_in_mins is -1", "write a number >= 0"),
    Bad("heartbeat without a pause", "heartbeat_interval_in_secs: 0", 1, "heartbeat_interval_in_secs is 0", "write a number > 0"),
    Bad(
        "data may change where nothing is resumed",
        "allow_data_change: true",
        1,
        "allow_data_change is about a resumed run, but load is not set",
        "remove allow_data_change",
    ),
    Bad("keep every of all", "keep_every: 100", 1, "keep_last_n_checkpoints is not set", "set keep_last_n_checkpoints"),
    Bad("keep every nothing", "keep_last_n_checkpoints: 2\nkeep_every: 0", 2, "a whole number >= 1", "write a whole number >= 1"),
    Bad("failures below none", "checkpoint_failures_allowed: -1", 1, "a whole number >= 0", "write a whole number >= 0"),
    Bad(
        "replicas of nothing",
        "replica_check_interval: 5\nzero_optimization: {stage: 3}",
        1,
        "each weight is on one only",
        "ZeRO stage 0, 1 or 2",
    ),  # fmt: skip
    Bad("replicas never", "replica_check_interval: 0", 1, "a whole number >= 1", "write a whole number >= 1"),
    Bad("export without save", "save_hf: true", 1, "save is not set", "set save"),
    Bad("export never", "save: out\ncheckpoint_factor: 10\nsave_hf: 0", 3, "no number of steps", "a whole number >= 1"),
    Bad("export by a word", "save: out\ncheckpoint_factor: 10\nsave_hf: often", 3, "true or false", "true"),
    Bad("Hugging Face model without a name", 'load: "hf:"', 1, "names no model", "hf:<owner>/<name>"),
    Bad("step of a Hugging Face model", "load: hf:gpt2\niteration: 5", 2, "names a checkpoint", "remove iteration"),
    Bad("async without save", "checkpoint_async: true", 1, "save is not set", "set save"),
    Bad("rollback to nothing", "nonfinite_policy: rollback", 1, "save is not set", "set save"),
    Bad(
        "rollback without moments",
        "save: out\ncheckpoint_factor: 10\nno_save_optim: true\nnonfinite_policy: rollback",
        4,
        "no_save_optim leaves out",
        "remove no_save_optim",
    ),
    Bad(
        "rollback in epochs",
        "save: out\ncheckpoint_factor: 10\ntrain_iters: null\ntrain_epochs: 1\nnonfinite_policy: rollback",
        5,
        "train_epochs leaves none",
        "use train_iters",
    ),
    Bad("spikes of what", "loss_spike_policy: stop", 1, "loss_spike_factor is not set", "loss_spike_factor: 4"),
    Bad("spikes below", "loss_spike_factor: 1", 1, "a number > 1", "write a number > 1"),
    Bad("unknown policy", "nonfinite_policy: ignore", 1, "one of stop, skip, rollback", "write"),
    Bad("verify how", "checkpoint_verify: sizes", 1, "one of full, size, off", "write size"),
    Bad("iteration of nothing", "iteration: 10", 1, "load is not set", "global_step10"),
    Bad("hostfile missing", "global_num_gpus: null\nhostfile: no/such/file", 2, "cannot read the hostfile", "global_num_gpus"),
    Bad(
        "extra args repeat",
        "steps_per_print: 5\ndeepspeed_extra_args: {steps_per_print: 6}",
        2,
        "deepspeed_extra_args.steps_per_print is 6",
        "outside of",
    ),
)


def write(folder, text: str) -> list[str]:
    """BASE without the keys that `text` sets, and `text`."""
    keys = {match.replace("-", "_") for match in re.findall(r"^([a-z_0-9-]+):", text, re.M)}
    kept = [line for line in BASE.splitlines() if line.split(":")[0] not in keys]
    (folder / "base.yml").write_text("\n".join(kept) + "\n")
    (folder / "bad.yml").write_text(text + "\n")
    return [str(folder / "base.yml"), str(folder / "bad.yml")]


def test_the_base_is_good(tmp_path):
    assert NeoXArgs.from_ymls(write(tmp_path, "log_interval: 1")).run.train_batch_size == 4


def test_every_bad_config_is_refused_with_place_and_fix(tmp_path):
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ConfigError) as caught:
            NeoXArgs.from_ymls(write(folder, case.text))
        report = caught.value.report()
        assert caught.value.exit_code == 77, case.name
        assert len(caught.value.problems) == 1, f"{case.name}: one fault, one problem\n{report}"
        assert case.says in re.sub(r" +", " ", report), f"{case.name}:\n{report}"
        assert case.fix in caught.value.problems[0].fix, f"{case.name}:\n{report}"
        place = f"bad.yml:{case.line}" if case.line else "bad.yml"
        assert re.search(re.escape(place) + r"(?!\d)", caught.value.problems[0].where), f"{case.name}:\n{report}"
        assert "pydantic" not in report and "Traceback" not in report and "type=" not in report, case.name


def test_the_launcher_refuses_them_before_it_starts_anything(tmp_path):
    """As real commands: one fault of each kind."""
    wanted = ("unknown key", "twice in one file", "yaml bracket", "batch without solution", "kv heads")
    (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'started')!r}, 'w')\n")
    for case in (case for case in CASES if case.name in wanted):
        folder = tmp_path / case.name.replace(" ", "_")
        folder.mkdir()
        command = [sys.executable, str(ROOT / "deepy.py"), str(tmp_path / "script.py"), *write(folder, case.text)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (77, ""), case.name
        assert f"bad.yml:{case.line}" in done.stderr and case.says in re.sub(r" +", " ", done.stderr), done.stderr
        assert "fix:" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "started").exists()


def test_all_problems_are_reported_at_once(tmp_path):
    text = "hiden_size: 1\nrotary_pct: 2\nnum_kv_heads: 3\nsave: out\noptimizer: {type: Adm}"
    with pytest.raises(ConfigProblems) as caught:
        NeoXArgs.from_ymls(write(tmp_path, text))
    assert sorted(problem.where.split("bad.yml:")[1][0] for problem in caught.value.problems) == ["1", "2", "3", "4", "5"]
    report = str(caught.value)
    assert report.startswith("5 problems in the configuration:")
    for words in ("hiden_size", "rotary_pct is 2", "num_kv_heads 3", "nothing says when to save", "'Adm'"):
        assert words in report


def test_a_wrong_value_does_not_cause_problems_elsewhere(tmp_path):
    with pytest.raises(ConfigProblems) as caught:
        NeoXArgs.from_ymls(write(tmp_path, "num_attention_heads: many\nseq_length: long\ntrain_batch_size: big"))
    assert len(caught.value.problems) == 3


def test_duplicates_across_files_name_both_places(tmp_path):
    (tmp_path / "a.yml").write_text("train-iters: 5\n")
    for spelling in ("train-iters", "train_iters"):
        (tmp_path / "b.yml").write_text(f"# later\n{spelling}: 7\n")
        with pytest.raises(ConfigProblems) as caught:
            NeoXArgs.from_ymls(["a", "b"], conf_dir=str(tmp_path))
        problem = caught.value.problems[0]
        assert problem.what == "train_iters is set twice"
        assert problem.where == f"{tmp_path}/a.yml:1, {tmp_path}/b.yml:2"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "model.yml").write_text(BASE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.yml").write_text("seed: 1")
    (tmp_path / "latin.yml").write_bytes(b"save: \xe9\n")
    for paths, words in (
        (["modell"], "model.yml"),  # and no word about what the unread file does not set
        (["model", "other/model"], "two config files are called model.yml"),
        (["model", "latin"], "not UTF-8"),
    ):
        with pytest.raises(ConfigProblems) as caught:
            NeoXArgs.from_ymls(paths, conf_dir=str(tmp_path))
        assert words in caught.value.report() and len(caught.value.problems) == 1


def test_wrong_flags_are_placed_at_the_flag(tmp_path):
    with pytest.raises(ConfigProblems) as caught:
        NeoXArgs.from_ymls(write(tmp_path, "seed: 1"), overwrites={"num-layerz": 3, "rotary_pct": 3})
    assert sorted(problem.where for problem in caught.value.problems) == ["--num_layerz", "--rotary_pct"]
