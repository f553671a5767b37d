# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel processes train what one process trains, with and without ZeRO and with uneven masks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "train"

CHAT = {f"{split}{label}_data_paths": [f"data/chat{label}_document"] for split in ("train", "valid", "test") for label in ("", "_label")}


def losses_of(rank: int, world: int, folder: str, layout: dict[str, Any]) -> list[float]:
    """Losses of three steps of this rank's engine."""
    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.data.build import build_data
    from megatron.engine.build import build_engine, join_job
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.build import build_objective

    os.chdir(GOLDEN)
    overwrites = {
        "padded_vocab_size": 512,
        "index_map_dir": folder,
        "save": None,
        "global_num_gpus": world,
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": None,
        "lr_decay_style": "constant",
        "warmup": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-4}},
        **CHAT,
        **layout,
    }
    args = NeoXArgs.from_ymls([str(GOLDEN / "neox_pp0" / "config.yml")], overwrites=overwrites)
    groups, device = join_job(args)
    objective = build_objective(args, eod=0)
    data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size)
    engine, _ = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
    batches = data.train.batches(objective.collate, start_sample=0)
    results = [engine.train_step(objective, [next(batches) for _ in range(args.run.gradient_accumulation_steps)]) for _ in range(3)]
    return [result.metrics["lm_loss"] for result in results] + [result.grad_norm or 0.0 for result in results]


def resumed_and_whole(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Weights after four steps with dropout, in one run and in two; and this rank's random state at the start of other resumed runs."""
    import torch

    from megatron.checkpoint.formats.neox_files import read_weights
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)
    common = {
        **{"global_num_gpus": world, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": None},
        **{"hidden_dropout": 0.3, "index_map_dir": folder, "extra_save_iters": None, "lr_decay_iters": 8},
    }

    def run(train_iters: int, name: str, **more: Any) -> torch.Tensor:
        overwrites = {**common, "train_iters": train_iters, "save": f"{folder}/{name}", "load": f"{folder}/{name}", **more}
        pretrain(NeoXArgs.from_ymls(["neox_pp0/config.yml"], overwrites=overwrites))
        return torch.get_rng_state()

    run(4, "whole")
    run(2, "halves")
    run(4, "halves")
    weights = [read_weights(Path(folder) / name / "global_step4") for name in ("whole", "halves")]
    # The recorded checkpoint knows the random state of one rank.
    foreign = run(0, "foreign", load="neox_pp0/ckpt", no_load_optim=True, save=None)
    return {"equal": all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), "foreign": foreign.tolist()}


@pytest.mark.timeout(150)
def test_resume_on_two_ranks_is_exact_and_their_dropout_differs(tmp_path: Path) -> None:
    """Each rank takes up its own random state; ranks whose state the checkpoint does not know get different ones."""
    first, second = run_distributed(resumed_and_whole, world=2, timeout_s=120, init=False, folder=str(tmp_path))
    assert first["equal"] and second["equal"]
    assert first["foreign"] != second["foreign"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "layout",
    [
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2}},
        {"pipe_parallel_size": 1},
    ],
    ids=["zero0", "zero1", "zero2", "pipeline"],
)
def test_two_processes_equal_one(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Losses and gradient norms of three steps."""
    alone = run_distributed(losses_of, world=1, timeout_s=90, init=False, folder=str(tmp_path), layout={})
    together = run_distributed(losses_of, world=2, timeout_s=90, init=False, folder=str(tmp_path), layout=layout)
    assert together[0] == together[1]
    assert together[0] == pytest.approx(alone[0], rel=2e-5)
