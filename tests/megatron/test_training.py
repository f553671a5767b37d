# SPDX-License-Identifier: Apache-2.0
"""pretrain(args) as a whole on a tiny model: resume is exact, batches may be cut anyhow, wrong folders are errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"


def run(tmp_path: Path, **overrides: Any) -> Any:
    """Train the tiny recorded configuration in this process."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    defaults = {
        "index_map_dir": str(tmp_path / "maps"),
        "train_iters": 4,
        "lr_decay_iters": 8,
        "save": None,
        "extra_save_iters": None,
        "checkpoint_factor": 100,
        "eval_iters": 0,
        "log_dir": None,
    }
    return pretrain(NeoXArgs.from_ymls([str(GOLDEN / "neox_pp0" / "config.yml")], overwrites={**defaults, **overrides}))


def weights(directory: Path) -> dict[str, Tensor]:
    """Weights of the newest checkpoint."""
    from megatron.checkpoint.formats.neox_files import read_weights
    from megatron.checkpoint.steps.step_dirs import find_tag

    return {name: tensor.clone() for name, tensor in read_weights(directory / find_tag(directory)).items()}


@pytest.fixture(autouse=True)
def _in_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded configuration's paths are relative to its folder."""
    monkeypatch.chdir(GOLDEN)


@pytest.mark.parametrize(
    "layout",
    [
        {"pipe_parallel_size": 0},
        {"pipe_parallel_size": 1},
        {"precision": "bfloat16", "zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 1}, "use_mup": True, "mup_base_hidden_size": 16},
        {"optimizer": {"type": "SM3", "params": {"lr": 0.001, "momentum": 0.9}}},
        {"optimizer": {"type": "madgrad_wd", "params": {"lr": 0.001}}, "zero_optimization": {"stage": 1}},
        {"optimizer": {"type": "Muon", "params": {"lr": 0.001, "muon_lr": 0.02}}},
    ],
    ids=["sequential", "pipeline", "bf16_zero1", "zero2", "mup", "sm3", "madgrad_zero1", "muon"],
)
def test_resume_is_exact(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Two runs of two steps give bit for bit the weights of one run of four, dropout included."""
    import torch

    common = {"hidden_dropout": 0.1, "attention_dropout": 0.1, **layout}
    run(tmp_path, save=str(tmp_path / "whole"), **common)
    halves = str(tmp_path / "halves")
    run(tmp_path, save=halves, load=halves, train_iters=2, **common)
    state = run(tmp_path, save=halves, load=halves, **common)
    assert (state.iteration, state.samples, state.tokens) == (4, 16, 16 * 64)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_cut_of_the_batch_does_not_matter(tmp_path: Path) -> None:
    """4 x 1, 2 x 2 and 1 x 4 micro batches train the same weights, also where some micro batches have few trained tokens."""
    import torch

    chat = {
        "train_data_paths": ["data/chat_document"],
        "train_label_data_paths": ["data/chat_label_document"],
        "valid_data_paths": ["data/chat_document"],
        "valid_label_data_paths": ["data/chat_label_document"],
        "test_data_paths": ["data/chat_document"],
        "test_label_data_paths": ["data/chat_label_document"],
    }
    found = []
    for micro in (1, 2, 4):
        save = tmp_path / f"micro{micro}"
        run(
            tmp_path,
            save=str(save),
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=4 // micro,
            optimizer={"type": "SGD", "params": {"lr": 0.1}},
            **chat,
        )
        found.append(weights(save))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_position_is_a_count_of_samples(tmp_path: Path) -> None:
    """A run that goes on with another batch size goes on behind the samples it has seen."""
    save = str(tmp_path / "out")
    run(tmp_path, save=save, load=save, train_iters=2)
    state = run(tmp_path, save=save, load=save, train_iters=3, gradient_accumulation_steps=1)
    assert (state.iteration, state.samples) == (3, 2 * 4 + 2)


@pytest.mark.parametrize("stage", [0, 1])
def test_override_lr_scheduler_wins_over_the_checkpoint(tmp_path: Path, stage: int) -> None:
    """ZeRO restores the optimizer, with the rate it was saved with, after the schedule."""
    save = str(tmp_path / "out")
    common = {"save": save, "load": save, "zero_optimization": {"stage": stage}, "lr_decay_style": "constant", "warmup": 0.0}
    run(tmp_path, train_iters=2, **common)
    changed = {"optimizer": {"type": "Adam", "params": {"lr": 0.003}}, "override_lr_scheduler": True}
    run(tmp_path, train_iters=4, **common, **changed)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if "lm_loss" in row] == pytest.approx([0.001, 0.001, 0.003, 0.003])


@pytest.mark.parametrize("stage", [0, 1])
def test_optimizer_numbers_of_the_configuration_win_over_the_checkpoint(tmp_path: Path, stage: int) -> None:
    """With a decay of 100 and a rate of 0.001, a step takes a tenth of a matrix away."""
    common = {"zero_optimization": {"stage": stage}, "lr_decay_style": "constant", "warmup": 0.0}
    first, second = tmp_path / "first", tmp_path / "second"
    run(tmp_path, train_iters=2, save=str(first), **common)
    run(tmp_path, train_iters=3, save=str(second), load=str(first), weight_decay=100.0, **common)
    name = "0.word_embeddings.weight"
    assert float(weights(second)[name].norm() / weights(first)[name].norm()) == pytest.approx(0.9, abs=0.02)


def test_clipping_clips(tmp_path: Path) -> None:
    """With SGD the size of one step is learning rate times clipped norm, for both engines."""
    import torch

    for layout in (0, 1):
        start, end = tmp_path / f"start{layout}", tmp_path / f"end{layout}"
        common = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "weight_decay": 0.0, "pipe_parallel_size": layout, "min_lr": 0.0}
        common |= {"lr_decay_style": "constant", "warmup": 0.0}
        run(tmp_path, save=str(start), extra_save_iters=[0], train_iters=1, gradient_clipping=0.01, **common)
        from megatron.checkpoint.formats.neox_files import read_weights

        before, after = read_weights(start / "global_step0"), weights(start)
        moved = math.sqrt(sum(float(torch.sum((after[name] - before[name]) ** 2)) for name in after))
        assert moved == pytest.approx(0.01, rel=1e-3), (layout, end)


def test_wrong_load_is_an_error(tmp_path: Path) -> None:
    """A folder without a checkpoint never means "from scratch", unless the run saves there."""
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        run(tmp_path, load=str(tmp_path / "typo"), save=str(tmp_path / "right"))
    assert not (tmp_path / "right").exists()
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 7"):
        run(tmp_path, load=str(GOLDEN / "neox_pp0" / "ckpt" / "global_step0"), iteration=7, finetune=True)
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 7"):
        run(tmp_path, load=str(GOLDEN / "neox_pp0" / "ckpt"), iteration=7, finetune=True)
    with pytest.raises(CheckpointError, match="num_layers: checkpoint 2, now 3"):
        run(tmp_path, load=str(GOLDEN / "neox_pp0" / "ckpt"), num_layers=3, attention_config=None)
    common = {"save": str(tmp_path / "own"), "load": str(tmp_path / "own")}
    run(tmp_path, train_iters=1, **common)
    with pytest.raises(CheckpointError, match="of another optimizer"):
        run(tmp_path, train_iters=2, optimizer={"type": "SGD", "params": {"lr": 0.001}}, override_lr_scheduler=True, **common)


def test_finetune_takes_the_weights_only(tmp_path: Path) -> None:
    """Iteration 0, fresh optimizer, recorded weights; a pipeline checkpoint serves a sequential run."""
    import torch

    state = run(tmp_path, load="neox_pp1/ckpt", finetune=True, train_iters=1, extra_save_iters=[0], save=str(tmp_path / "out"))
    assert state.iteration == 1
    # The step's own folder may be named, too.
    named = run(tmp_path, load="neox_pp1/ckpt/global_step0", finetune=True, train_iters=1, save=None)
    assert named.iteration == 1
    from megatron.checkpoint.formats.neox_files import read_weights

    started, recorded = read_weights(tmp_path / "out" / "global_step0"), read_weights(GOLDEN / "neox_pp1/ckpt/global_step0")
    assert all(torch.equal(started[name], recorded[name]) for name in recorded)


def test_metrics_file_tells_the_story(tmp_path: Path) -> None:
    """metrics.jsonl has a row per iteration, continues after a resume, and knows the validation loss."""
    save = str(tmp_path / "ckpt")
    common = {"save": save, "load": save, "eval_interval": 2, "eval_iters": 1, "log_interval": 1}
    run(tmp_path, train_iters=2, **common)
    run(tmp_path, train_iters=4, **common)
    rows = [json.loads(line) for line in (tmp_path / "ckpt" / "metrics.jsonl").read_text().splitlines()]
    trained = [row["iteration"] for row in rows if "lm_loss" in row]
    assert trained == [1, 2, 3, 4]
    assert {row["iteration"] for row in rows if "valid_lm_loss" in row} >= {2, 4}
