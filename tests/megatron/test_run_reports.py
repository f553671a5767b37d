# SPDX-License-Identifier: Apache-2.0
"""pretrain(args) with the keys about checkpoints kept, checks made and reports given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import CheckpointError, ConfigError
from tests.support.log_lines import parse_times

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"


@pytest.fixture(autouse=True)
def _in_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)


def run(tmp_path: Path, **overrides: Any) -> Any:
    """Train the tiny recorded configuration in this process."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    defaults = {
        "index_map_dir": str(tmp_path / "maps"),
        "train_iters": 4,
        "extra_save_iters": None,
        "checkpoint_factor": 1,
        "log_dir": None,
    }
    defaults["save"] = f"{tmp_path}/ckpt/"
    return pretrain(NeoXArgs.from_ymls([str(GOLDEN / "neox_pp0" / "config.yml")], overwrites={**defaults, **overrides}))


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "ckpt" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", [{}, {"pipe_parallel_size": 1}, {"zero_optimization": {"stage": 1}}], ids=["plain", "pipeline", "zero1"])
def test_small_checkpoints_that_are_checked(tmp_path: Path, layout: dict[str, Any]) -> None:
    """keep_last_n_checkpoints, no_save_optim and the forward-pass check, written and read."""
    from megatron.checkpoint.steps.step_dirs import saved_steps

    checked = {"checkpoint_validation_with_forward_pass": True, "no_save_optim": True, **layout}
    run(tmp_path, keep_last_n_checkpoints=2, extra_save_iters=[0], **checked)
    assert saved_steps(tmp_path / "ckpt") == [0, 3, 4] and (tmp_path / "ckpt/latest").read_text() == "global_step4"
    newest = tmp_path / "ckpt" / "global_step4"
    assert not list(newest.rglob("*optim_states.pt"))
    import torch

    held = torch.load(newest / "mp_rank_00_model_states.pt", weights_only=False)
    assert held["optimizer"] is None and held["checkpoint_validation_logits"].shape == (1, 16, 512)

    load = {"load": f"{tmp_path}/ckpt/", "save": f"{tmp_path}/ckpt/", "train_iters": 5}
    with pytest.raises(CheckpointError, match="without the optimizer's state"):
        run(tmp_path, **load, **checked)
    state = run(tmp_path, **load, no_load_optim=True, **checked)
    assert state.iteration == 5 and state.samples == 20
    # The same weights under another rotary share are another model, and only the logits tell.
    finetune = {**load, "finetune": True, "save": None, "train_iters": 0}
    with pytest.raises(CheckpointError, match="is not the one that was saved"):
        run(tmp_path, **finetune, rotary_pct=0.5, **checked)
    run(tmp_path, **finetune, rotary_pct=0.5, **layout)


def test_zero3_checkpoints_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every data rank keeps its own bookkeeping file, the logits are found in it."""
    checked = {"checkpoint_validation_with_forward_pass": True, "zero_optimization": {"stage": 3}, "checkpoint_factor": 100}
    run(tmp_path, train_iters=1, **checked)
    run(tmp_path, train_iters=2, load=f"{tmp_path}/ckpt", **checked)
    assert "gives the logits of the checkpoint" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is not the one that was saved"):
        run(tmp_path, train_iters=3, load=f"{tmp_path}/ckpt", rotary_pct=0.5, **checked)


def test_a_checkpoint_without_logits_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded checkpoint of the reference holds none: said in a line, and the run goes on."""
    run(tmp_path, load="neox_pp0/ckpt", finetune=True, train_iters=0, save=None, checkpoint_validation_with_forward_pass=True)
    assert "holds no logits of a fixed input" in capsys.readouterr().out


def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms, noise scale and timers stand in metrics.jsonl; validation has a perplexity per character; a time limit ends the run."""
    asked = dict.fromkeys(
        ("log_param_norm", "log_grad_norm", "log_grad_pct_zeros", "log_optimizer_states", "log_gradient_noise_scale"), True
    ) | {"gradient_noise_scale_n_batches": 1, "wall_clock_breakdown": True, "char_level_ppl": True}
    run(tmp_path, eval_iters=2, eval_interval=2, checkpoint_factor=100, **asked)
    trained = [row for row in rows(tmp_path) if "lm_loss" in row]
    assert len(trained) == 4
    for row in trained:
        assert row["gradient_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["parameter_norm"] > 1 and 0 < row["pct_grad_zeros"] < 100 and row["optimizer_state_norm_exp_avg"] > 0
        phases = sum(row[f"seconds_{name}"] for name in ("forward", "backward", "optimizer"))
        assert 0.5 * row["seconds"] < phases <= row["seconds"] and row["seconds_batch_generator"] > 0
    assert any(row.get("noise_scale", 0) > 0 for row in trained)
    printed = [times for line in capsys.readouterr().out.splitlines() if (times := parse_times(line)) and "forward" in times]
    assert len(printed) == 4 and set(printed[0]) == {"forward", "backward", "optimizer", "batch generator"}

    (valid,) = [row for row in rows(tmp_path) if "valid_lm_loss" in row and row["iteration"] == 4]
    assert valid["valid_lm_loss_char_lvl_ppl"] == pytest.approx(math.exp(valid["valid_lm_loss"] * tokens_per_character(tmp_path)), rel=1e-6)
    assert 1 < valid["valid_lm_loss_char_lvl_ppl"] < valid["valid_lm_loss_ppl"]


def tokens_per_character(tmp_path: Path) -> float:
    """Of the first eight validation samples, counted by the tokenizers library."""
    from tokenizers import Tokenizer

    from megatron.data.build import build_data
    from megatron.neox_arguments import NeoXArgs

    args = NeoXArgs.from_ymls([str(GOLDEN / "neox_pp0" / "config.yml")])
    data = build_data(args.replace(eval_iters=2, padded_vocab_size=512, index_map_dir=str(tmp_path)), streams=("text",), rank=0, size=1)
    assert data.valid is not None
    tokenizer = Tokenizer.from_file("../tokenizer/tokenizer.json")
    texts = []

    class Texts:
        def collate(self, samples: Any) -> Any:
            texts.extend(sample["text"][1:].tolist() for sample in samples)

    batches = data.valid.batches(Texts().collate, start_sample=0)
    for _ in range(4):
        next(batches)
    eod = tokenizer.token_to_id("<|endoftext|>")
    characters = sum(len(tokenizer.decode([i for i in text if i != eod], skip_special_tokens=False)) for text in texts)
    return sum(map(len, texts)) / characters


def test_a_time_limit_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """Less than one step's time: the run stops after its first step."""
    state = run(tmp_path, exit_duration_in_mins=1e-6, checkpoint_factor=100)
    assert state.iteration == 1 and (tmp_path / "ckpt" / "latest").read_text() == "global_step1"


def test_refusals(tmp_path: Path) -> None:
    """What cannot work is said before or at the start."""
    from megatron.neox_arguments import ConfigProblems

    for bad, said in (
        ({"log_grad_norm": True, "pipe_parallel_size": 1, "zero_optimization": {"stage": 1}}, "without showing gradients"),
        ({"log_gradient_noise_scale": True, "pipe_parallel_size": 2, "global_num_gpus": 2}, "of a micro batch on one rank"),
        ({"log_gradient_noise_scale": True, "gradient_accumulation_steps": 1}, "a step has only one"),
        ({"log_optimizer_states": True, "precision": "fp16"}, "without regard to parameters"),
    ):
        with pytest.raises(ConfigProblems, match=said):
            run(tmp_path, **bad)
    with pytest.raises(ConfigError, match="memory of CUDA devices"):
        run(tmp_path, memory_profiling=True)
