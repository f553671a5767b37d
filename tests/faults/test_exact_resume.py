# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and starts again ends with the bits of one that was not, and takes the same samples at other numbers of ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from support.jobs import GOLDEN, Job, settings

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

DEBUG = {"LOGLEVEL": "DEBUG"}
DEFAULT = {
    "one rank, fp32, accumulating": (1, {"train_batch_size": 4}),
    "two ranks, bf16, ZeRO 1": (2, {"train_batch_size": 2, "precision": "bfloat16", "zero_optimization": {"stage": 1}}),
}


def _every_case() -> Iterator[Any]:
    for world, precision, accumulation, stage in product((1, 2), ("fp32", "bfloat16"), (1, 4), (0, 1, 2, 3)):
        layout = {"train_batch_size": world * accumulation, "precision": precision, "zero_optimization": {"stage": stage}}
        yield pytest.param(world, layout, id=f"{world} ranks, {precision}, {accumulation} micro batches, ZeRO {stage}")
    for precision in ("fp32", "bfloat16"):
        yield pytest.param(2, {"pipe_parallel_size": 2, "precision": precision}, id=f"two stages, {precision}")
        yield pytest.param(2, {"model_parallel_size": 2, "precision": precision}, id=f"two tensor ranks, {precision}")


def taken(job: Job) -> list[str]:
    """A digest of the tokens of each step of a run."""
    return re.findall(r"tokens of the step: (\w+)", job.output)


def steps_of(job: Job) -> dict[int, tuple[float, float, float]]:
    """Loss, learning rate and gradient norm of each step; of one made twice, the last."""
    return {row["iteration"]: (row["lm_loss"], row["learning_rate"], row["grad_norm"]) for row in job.rows() if "lm_loss" in row}


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two files' contents are not the same to the last bit."""
    import numpy as np
    import torch

    if type(one) is not type(other):
        return [f"{place}: {type(one).__name__}, {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [place]
    if isinstance(one, Mapping):
        keys = [f"{place}.{key}" for key in set(one) ^ set(other)]
        return keys + [line for key in set(one) & set(other) for line in differing(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, (list, tuple)):
        pairs = enumerate(zip(one, other, strict=False))
        return [place] * (len(one) != len(other)) + [line for i, (a, b) in pairs for line in differing(a, b, f"{place}[{i}]")]
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return differing(vars(one), vars(other), place) if vars(one) else [place] * (one != other)
    return [] if one == other else [f"{place}: {one!r}, {other!r}"]


def require_same_files(one: Path, other: Path) -> None:
    """Weights, moments, random states, schedule, position: everything in every file of two step folders."""
    from megatron.checkpoint.formats.torch_file import read_torch_file

    names = sorted(path.name for path in one.glob("*.pt"))
    assert names and names == sorted(path.name for path in other.glob("*.pt"))
    for name in names:
        contents = [read_torch_file(folder / name, deepspeed_types=True) for folder in (one, other)]
        for content in contents:
            # Names of the run at trackers and in its folder; the numbers are all in other places.
            content.get("run_state", {}).pop("kept", None)
        assert differing(*contents, name) == []


def killed_and_whole(tmp_path: Path, world: int, layout: dict[str, Any]) -> None:
    """20 steps; and 10, a kill some steps later, and 10 more."""
    common = {"train_iters": 20, "lr_decay_iters": 20, "checkpoint_factor": 10, **layout}
    whole = Job(tmp_path / "whole", settings(tmp_path / "whole", world, **common), env=DEBUG, launched=False)
    assert whole.wait(200) == 0, whole.output[-3000:]
    config = settings(tmp_path / "killed", world, **common)
    sleeps = {"site": "step", "step": 13, "action": "sleep", "value": 300}
    killed = Job(tmp_path / "killed", config, faults=[sleeps], env=DEBUG, launched=False)
    killed.until(lambda text: "saved checkpoint at iteration      10" in text and len(re.findall("tokens of the step", text)) >= 12, 150)
    killed.kill()
    before = taken(killed)
    again = Job(tmp_path / "killed", config, env=DEBUG, launched=False)
    assert again.wait(200) == 0, again.output[-3000:]
    assert "starting from iteration 10" in again.output
    assert len(taken(whole)) == 20 and len(set(taken(whole))) > 1
    assert before == taken(whole)[:12] and taken(again) == taken(whole)[10:]
    assert steps_of(again) == steps_of(whole)
    require_same_files(tmp_path / "whole" / "run" / "global_step20", tmp_path / "killed" / "run" / "global_step20")


@pytest.mark.parametrize("case", DEFAULT)
def test_twenty_steps_are_ten_a_kill_and_ten(tmp_path: Path, case: str) -> None:
    """With dropout; to the last bit of every file."""
    killed_and_whole(tmp_path, *DEFAULT[case])


@pytest.mark.full
@pytest.mark.parametrize(("world", "layout"), list(_every_case()))
def test_twenty_steps_are_ten_a_kill_and_ten_every_way(tmp_path: Path, world: int, layout: dict[str, Any]) -> None:
    """Worlds, precisions, accumulation, partitions, stages and tensor ranks."""
    killed_and_whole(tmp_path, world, layout)


def test_two_ranks_then_one_then_two_take_every_sample_once(tmp_path: Path) -> None:
    """In the middle of an epoch of a mixture, killed twice; no sample is lost and none comes twice."""
    corpora = [str(GOLDEN / "train" / "data" / f"{name}_document") for name in ("corpus_text", "chat")]
    mixture = {"train_data_paths": corpora, "train_data_weights": [0.7, 0.3], "zero_optimization": {"stage": 1}}
    common = {"train_iters": 12, "lr_decay_iters": 12, "checkpoint_factor": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0, **mixture}
    whole = Job(tmp_path / "whole", settings(tmp_path / "whole", 1, **common), env=DEBUG, launched=False)
    assert whole.wait(200) == 0, whole.output[-3000:]
    found: list[str] = []
    for world, last in ((2, 4), (1, 8), (2, 12)):
        dies = [{"site": "step", "step": last + 1, "action": "kill"}]
        job = Job(tmp_path / "changing", settings(tmp_path / "changing", world, **common), faults=dies, env=DEBUG, launched=False)
        assert (job.wait(200) == 0) is (last == 12), job.output[-3000:]
        assert last == 4 or "are resharded" in job.output
        found += taken(job)
    assert len(set(found)) == 12 and found == taken(whole)
    assert {step: loss for step, (loss, *_) in steps_of(whole).items()} == pytest.approx(job.losses(), rel=1e-6)
