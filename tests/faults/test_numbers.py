# SPDX-License-Identifier: Apache-2.0
"""F19 and F20: losses and gradients that are no numbers, and losses that jump."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed
from support.jobs import GOLDEN, Job, settings
from support.tiny import tiny

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

BF16 = {"precision": "bfloat16"}
HOST = {"offload_optimizer": {"device": "cpu"}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16_zero2": {**BF16, **zero(2)},
    "pipeline": {"pipe_parallel_size": 2},
    "tensor_bf16": {"model_parallel_size": 2, **BF16},
}
# Stages and tensor ranks last: DeepSpeed remembers their grid for as long as the process lives.
MORE_LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "bf16": BF16,
    "bf16_zero1": {**BF16, **zero(1)},
    "bf16_zero3": {**BF16, **zero(3)},
    "context": {"context_parallel_size": 2},
    "zero1_host": zero(1, **HOST),
    "zero2_host": zero(2, **HOST),
    "zero3_host": zero(3, **HOST),
    "muon": {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}},
    "muon_zero2": {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}, "gradient_clipping": 0.0, **zero(2)},
    "pipeline_zero1": {"pipe_parallel_size": 2, **zero(1)},
    "pipeline_tied_bf16": {"pipe_parallel_size": 2, "style": "gpt2", **BF16},
    "tensor": {"model_parallel_size": 2},
    "sequence_zero2": {"model_parallel_size": 2, "sequence_parallel": True, **zero(2)},
}
# By step; each on one rank.
FAULTS = {
    1: {"site": "loss", "action": "nan", "rank": 1},
    3: {"site": "gradient", "action": "inf", "rank": 0},
    4: {"site": "loss", "action": "nan", "rank": 1},
}


def steps_of(rank: int, world: int, folder: str, layouts: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Five steps in every layout, three of them with a fault: what was said, and what changed."""
    import torch

    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.data.build import build_data
    from megatron.engine.build import build_engine, join_job
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.build import build_objective
    from megatron.tokenizer.build import build_tokenizer, with_vocabulary

    os.chdir(GOLDEN / "train")
    corpus = {f"{split}_data_paths": ["data/corpus_text_document"] for split in ("train", "valid", "test")}
    batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": None}
    fixed = {"global_num_gpus": world, "vocab_file": "../tokenizer/tokenizer.json", "index_map_dir": folder}

    def held(engine: Any) -> list[torch.Tensor]:
        """Weights, float32 copies and moments of this rank."""
        optimizer = getattr(engine.runner.optimizer, "optimizer", engine.runner.optimizer)
        parameters = list(engine.module().parameters())
        whole = [getattr(p, "ds_tensor", p).detach() for p in parameters]
        moments = [torch.as_tensor(value) for state in optimizer.state.values() for value in state.values()]
        return [t.clone() for t in (*whole, *(engine.local_shards().weight(p) for p in parameters), *moments)]

    found: dict[str, list[dict[str, Any]]] = {}
    for name, changes in layouts.items():
        args = NeoXArgs.from_dict(tiny(**{"style": "neox", **corpus, **batch, **fixed, **changes}))
        groups, device = join_job(args)
        tokenizer = build_tokenizer(args)
        args = with_vocabulary(args, tokenizer)
        objective = build_objective(args, eod=tokenizer.eod)
        data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size)
        engine, _ = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
        stream = data.train.batches(objective.collate)
        found[name] = []
        for number in range(1, 6):
            plan(Path(folder) / f"plan{rank}.yml", [FAULTS[number]] if number in FAULTS else [], number)
            before, schedule = held(engine), engine.runner.schedule.num_iters
            result = engine.train_step(objective, [next(stream) for _ in range(args.run.gradient_accumulation_steps or 1)])
            after = held(engine)
            pairs = list(zip(before, after, strict=False))  # some states are made in the first update
            found[name].append(
                {
                    "not_finite": result.not_finite,
                    "skipped": result.skipped,
                    "unchanged": all(torch.equal(a, b) for a, b in pairs) and len(pairs) >= len(before) > 0,
                    "finite": all(bool(t.isfinite().all()) for t in after),
                    "schedule": engine.runner.schedule.num_iters - schedule,
                }
            )
    return found


def plan(path: Path, rows: list[dict[str, Any]], step: int) -> None:
    """Make these the faults of this process."""
    import yaml

    from megatron import fault_injection

    path.write_text(yaml.safe_dump(rows))
    os.environ[fault_injection.PLAN] = str(path)
    fault_injection._plan.cache_clear()
    fault_injection.begin_step(step)


def check_steps(folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    ranks = run_distributed(steps_of, 2, 220, init=False, folder=str(folder), layouts=layouts, env={"NEOX_FAULTS": empty_plan(folder)})
    assert list(ranks[0]) == list(layouts)
    for name in layouts:
        first, second = (found[name] for found in ranks)
        assert first == second, name  # the same decision on both ranks
        for number, step in enumerate(first, start=1):
            bad = number in FAULTS
            assert step["finite"], (name, number)
            assert (step["skipped"], step["unchanged"], step["schedule"]) == ((True, True, 0) if bad else (False, False, 1)), (name, number)
            assert ("loss on rank 1" in step["not_finite"]) == (bad and number != 3), (name, number, step)
            assert ("gradient" in step["not_finite"]) == bad, (name, number, step)


def empty_plan(folder: Path) -> str:
    path = folder / "plan.yml"
    path.write_text("[]")
    return str(path)


def test_no_update_is_made_of_what_is_not_finite(tmp_path: Path) -> None:
    check_steps(tmp_path, LAYOUTS)


@pytest.mark.full
def test_no_update_is_made_in_any_other_layout(tmp_path: Path) -> None:
    check_steps(tmp_path, MORE_LAYOUTS)


def test_the_run_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    job = Job(tmp_path, settings(tmp_path, 2, train_iters=6), faults=[{"site": "loss", "rank": 1, "step": 3, "action": "nan"}])
    assert job.wait(150) == 78
    assert "not finite: loss on rank 1" in job.output and "iteration 3, samples [8, 12)" in job.output
    assert sorted(job.losses()) == [1, 2] and not (job.save / "latest").exists()


def test_skipped_steps_are_counted_over_a_resume(tmp_path: Path) -> None:
    config = settings(tmp_path, 1, train_iters=4, nonfinite_policy="skip", nonfinite_limit=2)
    faults = [{"site": "loss", "step": 2, "action": "nan"}, {"site": "gradient", "step": 4, "action": "inf"}]
    assert Job(tmp_path, config, faults=faults).wait(150) == 0
    again = Job(tmp_path, {**config, "train_iters": 9}, faults=[{"site": "loss", "action": "nan", "skip": 4, "times": 99}])
    assert again.wait(150) == 78 and "steps in a row made no update (nonfinite_limit: 2)" in again.output
    counts = {row["iteration"]: row.get("skipped_nonfinite") for row in again.rows()}
    assert counts == {1: None, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 4, 8: 5}


SPIKE = {"loss_spike_factor": 5, "loss_spike_window": 6, "loss_spike_patience": 3, "loss_spike_policy": "rollback"}


def spiked(folder: Path, world: int, **changes: Any) -> Job:
    """Steps 11 to 13 have 20 times the loss; step 15, that of the second attempt, is not a number. Checkpoints every 5."""
    config = settings(
        folder,
        world,
        train_iters=16,
        lr_decay_iters=16,
        checkpoint_factor=5,
        rollback_limit=2,
        nonfinite_policy="rollback",
        **SPIKE,
        **changes,
    )
    passes = 3 * config["train_batch_size"] // world if not {"pipe_parallel_size", "model_parallel_size"} & changes.keys() else 12
    spikes = [{"site": "loss", "step": step, "action": "scale", "value": 20, "times": passes // 3} for step in (11, 12, 13)]
    return Job(folder, config, faults=[*spikes, {"site": "loss", "step": 15, "action": "nan", "rank": world - 1}])


def check_spike(folder: Path, world: int, **changes: Any) -> None:
    job = spiked(folder / "first", world, **changes)
    assert job.wait(150) == 0, job.output[-3000:]
    output, rows = job.output, job.rows()
    assert "iterations 11 to 13, samples [40, 52): going back" in output
    assert "went back to step 10 (rollback 1); samples left out from now on: [40, 52)" in output
    # Position 56 is sample 68 by now.
    assert "iteration 15, samples [68, 72): going back" in output
    assert "went back to step 10 (rollback 2); samples left out from now on: [40, 52), [68, 72)" in output
    assert [row["iteration"] for row in rows if "lm_loss" in row] == [*range(1, 14), *range(11, 16), *range(11, 17)]
    assert [row["samples"] for row in rows if "lm_loss" in row][-1] == 64
    # Step 11 began three times with the same weights and random states: with the samples of the spike, and twice with those behind it.
    with_spike, *without = [row["lm_loss"] for row in rows if row["iteration"] == 11 and "lm_loss" in row]
    assert without[0] == without[1] and abs(with_spike / 20 - without[0]) > 1e-4
    # A fresh process that takes up the same checkpoint goes the same way, bit for bit: nothing of what was undone is left.
    config = settings(folder / "first", world, train_iters=16, lr_decay_iters=16, nonfinite_policy="rollback", **SPIKE, **changes)
    config |= {"rollback_limit": 2, "save": str(folder / "second" / "run"), "load": str(folder / "second" / "run")}
    (folder / "second" / "run").mkdir(parents=True)
    shutil.copytree(job.save / "global_step10", folder / "second" / "run" / "global_step10")
    (folder / "second" / "run" / "latest").write_text("global_step10")
    fresh = Job(folder / "second", config)
    assert fresh.wait(150) == 0, fresh.output[-3000:]
    expected = {number: loss for number, loss in job.losses().items() if number > 10}
    assert fresh.losses() == expected and len(expected) == 6
    assert {row["rollbacks"] for row in fresh.rows()} == {2}
    if world == 1:
        return
    # The limit counts over the resume.
    shutil.rmtree(folder / "second" / "run" / "global_step16")
    (folder / "second" / "run" / "latest").write_text("global_step10")
    third = Job(folder / "second", config, faults=[{"site": "loss", "step": 12, "action": "nan"}])
    assert third.wait(150) == 78 and "went back 2 times already" in third.output


def test_a_spike_is_undone_and_its_samples_left_out(tmp_path: Path) -> None:
    check_spike(tmp_path, 1)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [{}, zero(1), {**BF16, **zero(2)}, zero(3), BF16, {"pipe_parallel_size": 2}, {"model_parallel_size": 2, **BF16}],
    ids=["plain", "zero1", "bf16_zero2", "zero3", "bf16", "pipeline", "tensor_bf16"],
)
@pytest.mark.timeout(500)
def test_a_spike_is_undone_in_every_layout(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_spike(tmp_path, 2, **changes)


@pytest.mark.full
def test_without_an_earlier_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    config = settings(tmp_path, 1, train_iters=6, nonfinite_policy="rollback")
    job = Job(tmp_path, config, faults=[{"site": "loss", "step": 3, "action": "nan"}])
    assert job.wait(150) == 78 and "there is no checkpoint of step 2 or before" in job.output
