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
    from megatron.checkpoint.build import Source, Take
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
    engine, _ = build_engine(args, Source(Take.NOTHING), groups, device)
    batches = data.train.batches(objective.collate, start_sample=0)
    results = [engine.train_step(objective, [next(batches) for _ in range(args.run.gradient_accumulation_steps)]) for _ in range(3)]
    return [result.metrics["lm_loss"] for result in results] + [result.grad_norm or 0.0 for result in results]


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
