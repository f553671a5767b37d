# SPDX-License-Identifier: Apache-2.0
"""What is special about going on at another layout: files of others, weights in ZeRO-3's parts, fillings, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.engine.reshard import CheckpointLayout, stored_layout
from megatron.errors import CheckpointError
from support.dist import run_distributed
from support.jobs import settings
from support.reshard import LAYERS, Run, changes, flat_of

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "train"
TO_PIPELINE = {"pipe_parallel_size": 1}


def resumed(**overrides: Any) -> Any:
    """The recorded configuration, trained in this process."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)
    given = {"save": None, "extra_save_iters": None, "checkpoint_factor": 100, "eval_iters": 0, "log_dir": None, "gradient_clipping": 0.0}
    return pretrain(NeoXArgs.from_ymls(["neox_pp0/config.yml"], overwrites={**given, **overrides}))


def test_a_checkpoint_of_gpt_neox_goes_on_at_another_layout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its optimizer's numbers belong to the parameters in the order of the module, matrices first."""
    import torch

    from megatron.checkpoint.formats.optimizer_files import RECORD

    common = {"index_map_dir": str(tmp_path), "load": "neox_pp0/ckpt"}
    assert resumed(**common, train_iters=2, save=str(tmp_path / "own")).iteration == 2
    assert resumed(**common, train_iters=2, save=str(tmp_path / "other"), **TO_PIPELINE).iteration == 2
    written = "was written at: no pipeline, optimizer in one piece; this run has: pipeline of 1 stage, optimizer in one piece"
    assert written in capfd.readouterr().out
    folder = tmp_path / "own" / "global_step2"
    own, other = _optimizer(folder), _optimizer(tmp_path / "other" / "global_step2")
    assert set(own.masters) == set(other.masters) and len(own.masters) == 28
    for name, weight in own.masters.items():
        # Two steps at a rate of 1e-3: numbers of another parameter would be off by as much. Roundings differ by processor.
        assert (weight - other.masters[name]).abs().max() < 3e-5
    # A file as GPT-NeoX writes it: the same numbers without names.
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    del content[RECORD]
    (tmp_path / "unnamed").mkdir()
    torch.save(content, tmp_path / "unnamed" / path.name)
    unnamed = _optimizer(tmp_path / "unnamed")
    for key in ("exp_avg", "exp_avg_sq"):
        assert all(torch.equal(unnamed.states[key][name], own.states[key][name]) for name in own.masters)


def test_numbers_that_belong_to_nobody_known_are_refused(tmp_path: Path) -> None:
    """Stages of a pipeline whose optimizers do not name their parameters, and have other numbers of them than any layers."""
    import torch

    folder = tmp_path / "ckpt" / "global_step0"
    shutil.copytree(GOLDEN / "neox_pp2" / "ckpt" / "global_step0", folder)
    assert resumed(index_map_dir=str(tmp_path), load=str(folder), train_iters=1).iteration == 1
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    del content["optimizer"]["param_groups"][0]["params"][-1]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="which parameters its optimizer's numbers belong to(.|\n)*no_load_optim"):
        resumed(index_map_dir=str(tmp_path), load=str(folder), train_iters=1)
    assert resumed(index_map_dir=str(tmp_path), load=str(folder), train_iters=1, no_load_optim=True).iteration == 1


def test_what_is_bound_to_a_layout_is_refused(tmp_path: Path) -> None:
    """SM3's sums are of rows and columns; another optimizer has other sums."""
    common = {"index_map_dir": str(tmp_path), "save": str(tmp_path / "run"), "load": str(tmp_path / "run")}
    sm3 = {"type": "SM3", "params": {"lr": 0.01, "momentum": 0.9}}
    resumed(**common, train_iters=1, optimizer=sm3)
    with pytest.raises(CheckpointError, match="SM3 goes on at the layout it was written at alone(.|\n)*no_load_optim"):
        resumed(**common, train_iters=2, optimizer=sm3, **TO_PIPELINE)
    with pytest.raises(CheckpointError, match="is of another optimizer: SM3, and this run's is|SM3 goes on"):
        resumed(**common, train_iters=2, optimizer={"type": "Adam", "params": {"lr": 0.01}}, **TO_PIPELINE)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Adam's momentum is not Lion's."""
    common = {"index_map_dir": str(tmp_path), "save": str(tmp_path / "run"), "load": str(tmp_path / "run")}
    resumed(**common, train_iters=1)
    with pytest.raises(CheckpointError, match="of another optimizer: AdamW?, and this run's is Lion"):
        resumed(**common, train_iters=2, optimizer={"type": "Lion", "params": {"lr": 1e-3}}, **TO_PIPELINE)


def _optimizer(folder: Path) -> Any:
    from megatron.checkpoint.formats.optimizer_files import read_optimizer

    return read_optimizer(folder)[0]


def weights_alone(rank: int, world: int, folder: str) -> dict[str, Any]:
    """A ZeRO-3 run saved without its optimizer: its weights, and those with which two tensor ranks go on."""
    from megatron.engine.checkpointer import Checkpointer

    os.chdir(folder)
    run = Run(flat_of(folder, {"zero_optimization": {"stage": 3}, "no_save_optim": True}, "neox"))
    run.steps(2)
    Checkpointer(engine=run.engine, directory=Path(folder, "ckpt"), compared=run.compared, configs={}, optimizer=False).save(2, 8, 512)
    held = run.gathered()
    place = Path(folder, "ckpt", "global_step2")
    again = Run(flat_of(folder, {"model_parallel_size": 2}, "neox"), place, optimizer=False)
    return {"held": {name: value for name, value in held.items() if " " not in name}, "taken": again.gathered(), "samples": again.samples}


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_weights_of_zero_3_are_read_at_any_layout(tmp_path: Path) -> None:
    """By a run with a fresh optimizer, and for generation; the file that holds them stays where the optimizer is not saved."""
    import numpy as np
    import torch

    from megatron.checkpoint.formats.neox_files import read_weights
    from megatron.checkpoint.formats.torch_file import read_torch_file
    from megatron.generation.build import load_model
    from megatron.neox_arguments import NeoXArgs

    seen = run_distributed(weights_alone, 2, 280, init=False, folder=str(tmp_path))[0]
    held, folder = seen["held"], tmp_path / "ckpt" / "global_step2"
    assert all(np.array_equal(held[name], seen["taken"][name]) for name in held) and seen["samples"] == 8
    assert not any(name.endswith("exp_avg") for name in seen["taken"])
    stored = read_weights(folder)
    assert set(stored) == set(held) and all(torch.equal(stored[name], torch.from_numpy(held[name])) for name in held)
    for path in folder.glob("*optim_states.pt"):
        assert "optimizer_state_dict" not in read_torch_file(path, deepspeed_types=True)["optimizer_state_dict"]
    flat = settings(tmp_path, 1, load=str(tmp_path / "ckpt"), padded_vocab_size=512, **LAYERS)
    model = load_model(NeoXArgs.from_dict(flat)).model
    assert torch.equal(model.state_dict()["sequential.7.final_linear.weight"], torch.from_numpy(held["7.final_linear.weight"]))
    next(iter(folder.glob("*rank_1*optim_states.pt"))).unlink()
    with pytest.raises(CheckpointError, match="spread over 2 ranks, and 1 file is there"):
        read_weights(folder)


@pytest.mark.full
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_filled_up_vocabulary_is_cut_and_filled(tmp_path: Path) -> None:
    """512 tokens, to multiples of 40 for every tensor rank: 520 rows for one, 560 for two."""
    filling = {"make_vocab_size_divisible_by": 40}
    layouts = {"one": {**filling, "padded_vocab_size": 520}, "two": {**filling, "padded_vocab_size": 560, "model_parallel_size": 2}}
    pairs = [("one", "two"), ("two", "one")]
    found = run_distributed(changes, 2, 280, init=False, folder=str(tmp_path), layouts=layouts, pairs=pairs, style="neox")[0]
    for seen in found.values():
        assert seen["names"] == [] and seen["rows"]
        # Only the tables have other shapes; a row of zeros more is one more guess among hundreds.
        assert {name.split()[0] for name in seen["unequal"]} == {"0.word_embeddings.weight", "7.final_linear.weight"}
        assert 0 < seen["loss"] < 0.02


PLAIN = ["mp_rank_00_model_states.pt"]
ZERO = [*PLAIN, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]
ZERO_3 = [name.replace("optim", "model") for name in ZERO[1:]] + ZERO[1:]
TWO_STAGES = ["mp_rank_01_model_states.pt", *PLAIN, "layer_00-model_00-model_states.pt"]
ZERO_3_TENSOR = [name.replace("mp_rank_00", "mp_rank_01") for name in ZERO_3] + ZERO_3
PIPE = [*PLAIN, "layer_00-model_00-model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"]


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (PLAIN, CheckpointLayout()),
        (ZERO, CheckpointLayout(partitions=2)),
        (ZERO_3, CheckpointLayout(partitions=2, sharded=True)),
        (PIPE, CheckpointLayout(pipelined=True, partitions=1)),
        (TWO_STAGES, CheckpointLayout(pipelined=True, model_ranks=2)),
        (ZERO_3_TENSOR, CheckpointLayout(partitions=2, model_ranks=2, tensor_ranks=2, sharded=True)),
    ],
)
def test_layouts_are_told_from_file_names(tmp_path: Path, names: list[str], layout: CheckpointLayout) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert stored_layout(tmp_path) == layout
