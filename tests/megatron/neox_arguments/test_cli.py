# SPDX-License-Identifier: Apache-2.0
"""Command lines: flags over files, the encoded config of the workers, and what is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.errors import ConfigError, LostRankError
from megatron.neox_arguments.cli import consume_deepy_args, consume_neox_args, rank_count, run_face
from megatron.neox_arguments.flags import decode_config, encode_config, sort_words

MODEL = """\
num_layers: 2
hidden_size: 64
num_attention_heads: 4
seq_length: 32
max_position_embeddings: 32
train_iters: 10
train_batch_size: 8
optimizer: {type: AdamW, params: {lr: 1e-3, betas: [0.9, 0.95]}}
vocab_file: tokenizer.json
tokenizer_type: HFTokenizer
data_path: text_document
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small config; the environment looks as if no launcher had run."""
    for name in ("WORLD_SIZE", "RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "DLTS_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "model.yml").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return "model.yml"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--train_iters", "5"], "train_iters", 5),
        (["--train-iters=5"], "train_iters", 5),
        (["--checkpoint_activations"], "checkpoint_activations", True),
        (["--checkpoint_activations", "false"], "checkpoint_activations", False),
        (["--checkpoint-activations=no"], "checkpoint_activations", False),
        (["--min_lr", "1e-5"], "min_lr", 1e-5),
        (["--wandb_run_name", "123"], "wandb_run_name", "123"),
        (["--load", "null"], "load", None),
        (["--eval_tasks", "piqa", "lambada"], "eval_tasks", ["piqa", "lambada"]),
        (["--eval_tasks", "[piqa, lambada]"], "eval_tasks", ["piqa", "lambada"]),
        (["--extra_save_iters", "1", "2"], "extra_save_iters", [1, 2]),
        (["--zero_optimization", "{stage: 2}"], "zero_optimization", {"stage": 2}),
        (["--prompt_end=-- end"], "prompt_end", "-- end"),
        (["--num_nodes", "-1"], "num_nodes", -1),
        (["--autotuning", "tune"], "autotuning_run", "tune"),
        (["-H", "hosts"], "hostfile", "hosts"),
        (["-i", "in.txt"], "sample_input_file", "in.txt"),
        (["-o", "out.txt"], "sample_output_file", "out.txt"),
    ],
)
def test_a_flag_is_read_as_its_key_wants_it(words: list[str], key: str, value: Any) -> None:
    sorted_words = sort_words(["a.yml", *words, "b.yml"] if words[0] != "--eval_tasks" else ["a.yml", "b.yml", *words])
    assert sorted_words.bare == ["a.yml", "b.yml"]
    assert sorted_words.overrides == {key: value}


def test_a_list_flag_ends_before_the_next_config_file() -> None:
    assert sort_words(["--eval_tasks", "piqa", "lambada", "b.yml"]).bare == ["b.yml"]


def test_wrong_flags_are_reported_together_with_the_closest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        sort_words(["--trian_iters", "5", "--seed", "--sed=1", "--seed", "1", "--seed", "2", "--hiden_size", "8"])
    report = caught.value.report()
    for part in (
        "unknown flag --trian_iters",
        "--train_iters",
        "--seed needs a value",
        "unknown flag --sed",
        "--seed is given twice",
        "--hidden_size",
    ):
        assert part in report
    # A prefix is not a flag.
    with pytest.raises(ConfigError, match="unknown flag --train_iter"):
        sort_words(["--train_iter", "5"])


def test_flags_win_over_files_and_are_named_as_the_origin(conf: str) -> None:
    launch = consume_deepy_args(
        ["train.py", conf, "--train_iters", "3", "--lr", "5e-4", "--optimizer.params.betas", "[0.8, 0.9]", "--dry-run"]
    )
    args = launch.args
    assert (args.run.train_iters, args.optim.lr, launch.dry_run, launch.debug) == (3, 5e-4, True, False)
    assert args.optim.optimizer == {"type": "AdamW", "params": {"lr": 5e-4, "betas": [0.8, 0.9]}}
    assert str(args.origin("train_iters")) == "--train_iters"
    assert str(args.origin("hidden_size")) == "model.yml:2"
    assert args.runtime.user_script == "train.py"


def test_conf_dir_and_suffix(conf: str, tmp_path: Path) -> None:
    assert consume_deepy_args(["train.py", "-d", str(tmp_path), "model"]).args.model.num_layers == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "no script and config files"), (["train.py"], "no config files"), (["no.py", "model.yml"], "no.py does not exist")],
)
def test_an_incomplete_command_line_is_refused(conf: str, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        consume_deepy_args(words)


def test_workers_read_what_the_launcher_resolved(conf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = consume_deepy_args(["train.py", conf, "--global_num_gpus", "2", "--seed", "7"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = consume_neox_args(["--local_rank=1", *launch.script_args], overwrites={"num_samples": 3})
    assert args.text.num_samples == 3
    assert {**args.to_flat(), "num_samples": None} == {**launch.args.to_flat(), "num_samples": None}
    assert args.config_files == {"model.yml": MODEL}
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="for 2 ranks, but 4 were started"):
        consume_neox_args(launch.script_args)
    with pytest.raises(ConfigError, match="would be ignored"):
        consume_neox_args([*launch.script_args, "--seed", "8"])


def test_a_worker_started_without_deepy_reads_yaml_and_counts_its_ranks(conf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert consume_neox_args([conf, "--seed", "5"]).run.seed == 5
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = consume_neox_args(["--local-rank", "1", conf])
    assert (args.runtime.global_num_gpus, args.run.train_micro_batch_size_per_gpu) == (4, 2)
    with pytest.raises(ConfigError, match="for 2 ranks, but 4 were started"):
        consume_neox_args([conf, "--global_num_gpus", "2"])
    with pytest.raises(ConfigError, match="no config files"):
        consume_neox_args(["--seed", "5"])


def test_ranks_are_counted_from_each_launcher() -> None:
    assert rank_count({}) == 1
    assert rank_count({"SLURM_NTASKS": "8"}) == 1  # inside an allocation, but not started by srun
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        assert rank_count({name: "3"}) == 3


def test_autotuning_trials_change_only_what_is_tuned(conf: str, tmp_path: Path) -> None:
    launch = consume_deepy_args(["train.py", conf, "--autotuning", "run"])
    assert launch.script_args[:2] == ("--deepspeed_config", "ds_config.json")
    trial = tmp_path / "ds_config.json"
    trial.write_text('{"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "steps_per_print": 1}')
    args = consume_neox_args(["--deepspeed_config", str(trial), *launch.script_args[2:]])
    assert (args.run.train_batch_size, args.run.gradient_accumulation_steps, args.logs.steps_per_print) == (4, 2, 10)


def test_secrets_never_reach_a_command_line(conf: str) -> None:
    with pytest.raises(ConfigError, match="comet_others.api_key") as caught:
        consume_deepy_args(["train.py", conf, "--comet_others", "{api_key: abc}"])
    assert "abc" not in caught.value.report()
    assert "environment" in caught.value.report()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner), max_leaves=8
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(st.dictionaries(st.text(alphabet="abcdefgh_-", max_size=8), JSON, max_size=6))
def test_encoding_is_undone_by_decoding(values: dict[str, Any]) -> None:
    text = encode_config(values)
    assert decode_config(text, "--x") == values
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=")


def test_long_configs_are_compressed_and_broken_ones_named() -> None:
    values = {"train_data_paths": [f"data/part_{index:06d}/text_document" for index in range(20000)]}
    text = encode_config(values)
    assert len(text) < 128 * 1024
    assert decode_config(text, "--x") == values
    for broken in ("???", "e30", "bm90IGpzb24=", "WzFd"):
        with pytest.raises(ConfigError, match="--x"):
            decode_config(broken, "--x")


def test_a_face_reports_without_traceback_unless_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fails(argv: list[str]) -> None:
        raise ConfigError("it is wrong", where="a.yml:1", fix="do right")

    assert run_face(fails, [], usage="u", about="a") == 77
    assert capsys.readouterr().err == "[rank 3] it is wrong\n  where: a.yml:1\n  fix:   do right\n"
    assert run_face(fails, ["--debug"], usage="u", about="a") == 77
    assert "Traceback" in capsys.readouterr().err
    assert len(waits) == 2  # rank 0 speaks first
    assert run_face(fails, ["--help"], usage="how", about="what") == 0
    assert "usage: how" in (said := capsys.readouterr().out) and "Every YAML key is a flag too" in said
    assert run_face(fails, ["--help"], usage="how\n", about="what", keys=False) == 0
    assert capsys.readouterr().out == "usage: how\n\nwhat\n"


def test_a_rank_of_deepy_leaves_its_report_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "note"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("nobody else tells it first"))
    for error, status, consequence in ((ConfigError("wrong"), 77, False), (LostRankError("gone"), 1, True), (KeyError("bug"), 1, False)):

        def fails(argv: list[str], error: Exception = error) -> None:
            assert "NEOX_FAILURE_FILE" not in os.environ  # not for what this rank starts
            raise error

        monkeypatch.setenv("NEOX_FAILURE_FILE", str(note))
        assert run_face(fails, [], usage="u", about="a") == status
        told = json.loads(note.read_text())
        assert told["consequence"] == consequence and str(error) in told["text"]
        assert ("Traceback" in told["text"]) == isinstance(error, KeyError)
    assert capsys.readouterr().err == ""


def test_a_rank_of_srun_knows_its_place_before_it_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    step = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "5"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    assert run_face(lambda _: seen.extend(os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")), [], usage="", about="") == 0
    assert seen == ["3", "4", "n1"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert run_face(lambda _: int("RANK" in os.environ), [], usage="", about="", ranks=False) == 0
