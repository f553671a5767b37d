# SPDX-License-Identifier: Apache-2.0
"""Saving at once and in the background: the same files, one at a time, errors counted, nothing lost when a run ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron import fault_injection
from megatron.checkpoint.steps.manifest import Entry, Verify, look_at, read_manifest
from megatron.checkpoint.steps.step_dirs import latest_tag, saved_steps
from megatron.checkpoint.steps.write import RankFileWriter
from megatron.engine.checkpointer import Checkpointer
from megatron.errors import CheckpointError
from support.dist import run_distributed
from support.fake_engine import FakeEngine


class OneWeight(FakeEngine):
    """An engine of one tensor, which changes as soon as it was handed over."""

    weight = torch.zeros(1000)

    def save(self, directory: Path, tag: str, client_state: Mapping[str, Any], writing: RankFileWriter) -> None:
        super().save(directory, tag, {**client_state, "weight": self.weight}, writing)
        if writing._copies:
            self.weight += 1


def saver(folder: Path, **changes: Any) -> Checkpointer:
    return Checkpointer(
        **{"engine": OneWeight(), "directory": folder, "compared": {"num_layers": 2}, "configs": {"a.yml": "a: 1"}, **changes}
    )


def whole(folder: Path) -> list[int]:
    """The steps that are there; each must be whole."""
    steps = saved_steps(folder)
    assert all(look_at(folder / f"global_step{step}", Verify.FULL).whole for step in steps)
    assert not list(folder.glob("*.partial*")) + list(folder.glob("*.old*")) + list(folder.glob("*.deleted*"))
    return steps


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """RankFileWriter waits until this is set."""
    go_on = threading.Event()
    monkeypatch.setattr(fault_injection, "point", lambda site: go_on.wait(30) if site == "write" else None)
    return go_on


def broken(monkeypatch: pytest.MonkeyPatch, site: str = "write") -> Callable[[bool], None]:
    """A switch for a disk that is full at `site`."""
    on = [True]

    def point(where: str) -> None:
        if on[0] and where == site:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fault_injection, "point", point)
    return lambda now: on.__setitem__(0, now)


def test_what_a_manifest_says(tmp_path: Path) -> None:
    origin = {"run_id": "r1", "layout": {"tensor": 1}, "code_version": "1+gabc", "config": {"lr": 0.1}, "data": {"train": "f"}}
    told: list[Path] = []
    saves = saver(tmp_path, published=told.append, about=origin)
    saves.save(3, 12, 96)
    folder = tmp_path / "global_step3"
    manifest = read_manifest(folder)
    assert manifest is not None and (manifest.step, manifest.samples, manifest.tokens) == (3, 12, 96)
    assert (manifest.run_id, manifest.layout, manifest.code_version, manifest.config, manifest.data) == tuple(origin.values())
    assert set(manifest.files) == {"mp_rank_00_model_states.pt", "configs/a.yml"} and whole(tmp_path) == [3]
    assert latest_tag(tmp_path) == "global_step3" and told == [folder]
    assert saves.saved == 3 and saves.failures == 0 and saves.seconds is not None and saves.seconds > 0


def test_in_the_background_the_state_is_that_of_its_step(tmp_path: Path, slow: threading.Event) -> None:
    engine = OneWeight()
    saves = saver(tmp_path, engine=engine, background=True)
    engine.weight = torch.full((1000,), 5.0)
    saves.save(1, 1, 1)
    saves.poll()
    assert saves.saved is None and saved_steps(tmp_path) == [] and float(engine.weight[0]) == 6.0
    slow.set()
    saves.finish()
    content = torch.load(tmp_path / "global_step1" / "mp_rank_00_model_states.pt", weights_only=False)
    assert torch.equal(content["weight"], torch.full((1000,), 5.0)) and whole(tmp_path) == [1]


def test_only_one_is_under_way(tmp_path: Path, slow: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    saves = saver(tmp_path, background=True)
    saves.save(1, 1, 1)
    threading.Timer(0.3, slow.set).start()
    saves.save(2, 2, 2)
    assert saves.saved == 1 and "for the checkpoint of step 1, before the next" in caplog.text
    saves.finish()
    assert whole(tmp_path) == [1, 2]


def test_an_error_in_the_background_is_told_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    switch = broken(monkeypatch)
    saves = saver(tmp_path, background=True)
    saves.save(1, 1, 1)
    while saves._begun is not None:
        saves.poll()
    assert saves.failures == 1 and whole(tmp_path) == []
    assert "rank 0: mp_rank_00_model_states.pt: No space left on device" in caplog.text
    switch(False)
    saves.save(2, 2, 2)
    saves.finish()
    assert whole(tmp_path) == [2] and saves.saved == 2


@pytest.mark.parametrize("site", ["write", "manifest", "publish", "latest"])
def test_so_many_failures_in_a_row_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    """Wherever it fails, what was there before is what it was."""
    switch = broken(monkeypatch, site)
    switch(False)
    saves = saver(tmp_path, failures_allowed=2)
    saves.save(1, 1, 1)
    before = read_manifest(tmp_path / "global_step1")
    switch(True)
    saves.save(2, 2, 2)
    saves.save(3, 3, 3)
    switch(False)
    saves.save(4, 4, 4)
    switch(True)
    saves.save(5, 5, 5)
    saves.save(6, 6, 6)
    with pytest.raises(CheckpointError, match=r"step 7 was not saved \(3 in a row; checkpoint_failures_allowed: 2\)"):
        saves.save(7, 7, 7)
    assert saves.failures == 5 and saves.saved == 4 and latest_tag(tmp_path) == "global_step4"
    assert before == read_manifest(tmp_path / "global_step1")
    # A step whose folder has its name already is whole, whatever fails afterwards.
    assert whole(tmp_path) == ([1, 4] if site != "latest" else [1, 2, 3, 4, 5, 6, 7])


def test_a_failed_last_save_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    saves = saver(tmp_path, failures_allowed=10, background=True)
    with pytest.raises(CheckpointError, match="step 1 was not saved:\n.*No space left"):
        saves.save(1, 1, 1, last=True)


def test_a_step_saved_again_keeps_the_old_one_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = broken(monkeypatch)
    switch(False)
    saves = saver(tmp_path, about={"run_id": "old"})
    saves.save(1, 1, 1)
    switch(True)
    again = saver(tmp_path, about={"run_id": "new"})
    again.save(1, 1, 1)
    found = read_manifest(tmp_path / "global_step1")
    assert again.failures == 1 and found is not None and found.run_id == "old" and whole(tmp_path) == [1]
    switch(False)
    again.save(1, 1, 1)
    found = read_manifest(tmp_path / "global_step1")
    assert found is not None and found.run_id == "new" and whole(tmp_path) == [1]


def test_where_no_folder_can_be_made_it_is_a_failure_like_others(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saves = saver(tmp_path / "file" / "run")
    saves.save(1, 1, 1)
    assert saves.failures == 1


@pytest.mark.parametrize(("error", "found"), [(RuntimeError(), [1]), (KeyboardInterrupt(), [])], ids=["error", "interrupt"])
def test_a_run_that_ends_by_an_exception(tmp_path: Path, slow: threading.Event, error: BaseException, found: list[int]) -> None:
    """A single process finishes what is under way, unless somebody does not want to wait."""
    saves = saver(tmp_path, background=True)
    saves.save(1, 1, 1)
    threading.Timer(0.2, slow.set).start()
    saves.abandon(error)
    assert whole(tmp_path) == found
    saves.abandon(error)


def digests(folder: Path, background: bool, zero: int, rank: int, world: int) -> dict[str, Entry]:
    """What a DeepSpeed engine's files hold, by name."""
    from megatron.engine.deepspeed_runner import Runner
    from megatron.engine.distributed import start
    from megatron.engine.engine import TrainEngine
    from megatron.engine.micro_batches import Timers
    from megatron.launch.environment import Rendezvous
    from megatron.mpu.context import ContextPlan
    from megatron.optim.schedules import Decay, LRScheduler, ScheduleSpec

    torch.manual_seed(0)
    groups = start(Rendezvous(rank=rank, world_size=world) if world > 1 else Rendezvous(), torch.device("cpu"))
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = LRScheduler(optimizer, ScheduleSpec(start_lr=0.5, decay_style=Decay.CONSTANT, end_iter=10))
    config = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
    }
    runner = Runner(model, optimizer, schedule, config, groups)
    engine = runner.deepspeed

    def step() -> None:
        engine.backward(engine(torch.ones(1, 20)).float().sum())
        engine.step()

    step()
    random = torch.get_rng_state()
    found = {}
    for name, later in (("at once", False), ("later", True)):
        torch.set_rng_state(random)
        saves = Checkpointer(
            engine=TrainEngine(runner, None, torch.device("cpu"), Timers(), ContextPlan()),  # type: ignore[arg-type]
            directory=folder / name,
            compared={},
            configs={},
            background=later,
        )
        saves.save(1, 1, 1)
        if later:
            step()  # while it is written
        saves.finish()
        manifest = read_manifest(folder / name / "global_step1")
        assert manifest is not None
        found[name] = dict(manifest.files)
    assert found["at once"] == found["later"]
    return found["later"]


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.full), 2])
def test_the_same_files_at_once_and_later(tmp_path: Path, zero: int) -> None:
    assert len(digests(tmp_path, True, zero, 0, 1)) == 1 + (zero > 0)


def _digests(rank: int, world: int, folder: str, zero: int) -> int:
    return len(digests(Path(folder), True, zero, rank, world))


@pytest.mark.full
@pytest.mark.dist
@pytest.mark.timeout(150)
def test_the_same_files_of_partitioned_weights(tmp_path: Path) -> None:
    assert run_distributed(_digests, 2, 120, init=False, folder=str(tmp_path), zero=3) == [4, 4]
