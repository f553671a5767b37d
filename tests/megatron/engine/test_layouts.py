# SPDX-License-Identifier: Apache-2.0
"""Runs on two processes, shared in every way: they resume exactly, and other layouts read what they wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed
from support.tiny import tiny

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "train"

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2},
    "sequence_zero2": {"model_parallel_size": 2, "sequence_parallel": True, "zero_optimization": {"stage": 2}},
    "pipeline": {"pipe_parallel_size": 2},
    "pipeline_tied_bf16": {"pipe_parallel_size": 2, "style": "gpt2", "precision": "bfloat16", "zero_optimization": {"stage": 1}},
    "context": {"context_parallel_size": 2},
    "zero3": {"zero_optimization": {"stage": 3}},
}


def config(folder: str, world: int, style: str = "neox", **changes: Any) -> dict[str, Any]:
    """A tiny model with dropout on the recorded corpus."""
    paths = {f"{split}_data_paths": ["data/corpus_text_document"] for split in ("train", "valid", "test")}
    common = {"global_num_gpus": world, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": None}
    others = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "index_map_dir": folder, "checkpoint_factor": 1000, "log_dir": None}
    return tiny(style, **{"vocab_file": "../tokenizer/tokenizer.json", **paths, **common, **others, **changes})


def written_and_read(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Validation losses of what two tensor ranks trained, read by two stages."""
    import json

    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)
    common = {"hidden_dropout": 0, "attention_dropout": 0, "eval_iters": 2, "eval_interval": 2, "load": f"{folder}/tensor"}

    def losses(name: str, **layout: Any) -> list[float]:
        pretrain(NeoXArgs.from_dict(config(folder, world, **common, save=f"{folder}/{name}", **layout)))
        rows = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
        return [row["valid_lm_loss"] for row in rows if "valid_lm_loss" in row]

    trained = losses("tensor", model_parallel_size=2, train_iters=2)
    stages = {"pipe_parallel_size": 2, "no_load_optim": True, "train_iters": 2}
    return {"trained": trained, "stages": losses("stages", **stages)}


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_weights_go_from_tensor_ranks_to_stages(tmp_path: Path) -> None:
    """The same model comes out, biases that lay in shares among it."""
    for found in run_distributed(written_and_read, 2, 100, init=False, folder=str(tmp_path)):
        assert found["stages"][-1] == pytest.approx(found["trained"][-1], rel=1e-6)


def losses_by_partition(rank: int, world: int, folder: str) -> dict[str, list[float]]:
    """Losses of two steps of a model of three blocks, cut by every method."""
    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.data.build import build_data
    from megatron.engine.build import build_engine, join_job
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.build import build_objective

    os.chdir(GOLDEN)
    found = {}
    for method in ("type:transformer|mlp", "uniform", "parameters"):
        layout = {"pipe_parallel_size": 2, "pipe_partition_method": method, "num_layers": 3, "attention_config": None}
        args = NeoXArgs.from_dict(config(folder, world, "gpt2", padded_vocab_size=512, hidden_dropout=0, attention_dropout=0, **layout))
        groups, device = join_job(args)
        objective = build_objective(args, eod=0)
        batches = build_data(args, streams=objective.streams).train.batches(objective.collate, start_sample=0)
        engine, _ = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
        found[method] = [engine.train_step(objective, [next(batches) for _ in range(4)]).metrics["lm_loss"] for _ in range(2)]
        found[f"layers {method}"] = [float(sum(p.numel() for p in engine.module().parameters()))]
    return found


@pytest.mark.dist
@pytest.mark.timeout(100)
def test_where_a_pipeline_is_cut_makes_no_difference(tmp_path: Path) -> None:
    """Three methods cut in two ways or more; the losses are the same."""
    first, last = run_distributed(losses_by_partition, 2, 80, init=False, folder=str(tmp_path))
    assert len({first[key][0] for key in first if key.startswith("layers")}) > 1
    expected = first["uniform"]
    assert all(found == pytest.approx(expected, rel=1e-6) for key, found in {**first, **last}.items() if not key.startswith("layers"))


def measured(rank: int, world: int, folder: str, layout: dict[str, Any]) -> dict[str, float]:
    """The last of three steps as it stands in metrics.jsonl, norms of weights, gradients and optimizer states included."""
    import json

    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)
    asked = {"log_param_norm": True, "log_grad_norm": True, "log_optimizer_states": True, "log_grad_pct_zeros": True}
    plain = {"hidden_dropout": 0, "attention_dropout": 0, "train_iters": 3, "save": f"{folder}/{world}"}
    pretrain(NeoXArgs.from_dict(config(folder, world, **{**plain, **asked, **layout})))
    rows = [json.loads(line) for line in Path(folder, str(world), "metrics.jsonl").read_text().splitlines()]
    return {key: value for key, value in rows[-1].items() if "norm" in key or key in ("lm_loss", "pct_grad_zeros")}


@pytest.mark.dist
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("style", "layout"),
    [("neox", {"model_parallel_size": 2, "sequence_parallel": True}), ("gpt2", {"pipe_parallel_size": 2})],
    ids=["tensor_shares", "pipeline_tied"],
)
def test_norms_are_those_of_the_whole_model(style: str, layout: dict[str, Any], tmp_path: Path) -> None:
    """Shards, copies, shares of a summed bias and tied weights are each counted once, as in one process."""
    (alone,) = run_distributed(measured, 1, 60, init=False, folder=str(tmp_path), layout={"style": style})
    (first, _) = run_distributed(measured, 2, 100, init=False, folder=str(tmp_path), layout={"style": style, **layout})
    assert {"parameter_norm", "gradient_norm", "optimizer_state_norm_exp_avg"} <= set(alone)
    # A single entry may be rounded to 0 in one of the two.
    assert first.pop("pct_grad_zeros") == pytest.approx(alone.pop("pct_grad_zeros"), abs=0.01)
    assert first == pytest.approx(alone, rel=1e-5)


def resumed_and_whole(rank: int, world: int, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Losses of the third and fourth step in one run of four and in a second run of two, and the logits of a fixed input at the end."""
    import json

    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)

    def run(train_iters: int, name: str) -> list[float]:
        place = {"save": f"{folder}/{name}", "load": f"{folder}/{name}", "checkpoint_validation_with_forward_pass": True}
        pretrain(NeoXArgs.from_dict(config(folder, world, **layout, train_iters=train_iters, **place)))
        rows = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
        return [row["lm_loss"] for row in rows if "lm_loss" in row]

    whole = run(4, "whole")
    run(2, "halves")
    return {"whole": whole, "halves": run(4, "halves")}


@pytest.mark.dist
@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact(layout: str, tmp_path: Path) -> None:
    """Losses are those of one run to the last bit, with dropout; so the random state of every rank came back."""
    for found in run_distributed(resumed_and_whole, 2, 170, init=False, folder=str(tmp_path), layout=LAYOUTS[layout]):
        assert found["whole"] == found["halves"] and len(found["whole"]) == 4
