# SPDX-License-Identifier: Apache-2.0
"""Bits turn over, files are cut, lost, swapped or of another save: each is named, and the step before is taken. (F3, F4)"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpoint.steps.discovery import Search, find
from megatron.checkpoint.steps.manifest import MANIFEST, Verify, look_at
from megatron.checkpoint.steps.step_dirs import latest_tag, saved_steps, write_latest
from megatron.errors import CheckpointError
from support.checkpoints import KINDS, flip, step_folder
from support.jobs import Job, settings

FLIPS = 200


def test_no_flipped_bit_is_missed(tmp_path: Path) -> None:
    """Bits drawn over all files; each is found, and by the name of its file."""
    folder = step_folder(tmp_path, 10)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    ends = [sum(path.stat().st_size * 8 for path in files[: number + 1]) for number in range(len(files))]
    chance, hit = random.Random(0), set()
    for _ in range(FLIPS):
        bit = chance.randrange(ends[-1])
        number = next(number for number, end in enumerate(ends) if bit < end)
        path, within = files[number], bit - (ends[number - 1] if number else 0)
        flip(path, within)
        name = path.relative_to(folder).as_posix()
        finding = look_at(folder, Verify.FULL)
        assert [problem.partition(":")[0] for problem in finding.problems] == [name], f"bit {within} of {name}"
        flip(path, within)
        hit.add(name)
    assert look_at(folder, Verify.FULL).whole and len(hit) == len(files)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_is_named_and_the_step_before_taken(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where a run resumes itself; everybody else is refused, and told what to do."""
    for step in (5, 10):
        step_folder(tmp_path, step)
    write_latest(tmp_path, "global_step10")
    flip(tmp_path / "global_step10" / KINDS[kind])
    with pytest.raises(CheckpointError) as refused:
        find(Search(directory=tmp_path))
    assert KINDS[kind] in refused.value.what and refused.value.where == str(tmp_path / "global_step10" / KINDS[kind])
    assert "`iteration: 5`" in str(refused.value.fix) and saved_steps(tmp_path) == [5, 10]
    with pytest.raises(CheckpointError, match="is damaged"):
        find(Search(directory=tmp_path, iteration=10, own=True))
    assert find(Search(directory=tmp_path, own=True)) == "global_step5"
    assert KINDS[kind] in caplog.text and "global_step10.corrupt" in caplog.text
    assert saved_steps(tmp_path) == [5] and latest_tag(tmp_path) == "global_step5" and (tmp_path / "global_step10.corrupt").is_dir()


def test_when_none_is_left_nothing_begins_anew(tmp_path: Path) -> None:
    """Also at the starts after that one, when the bad ones have other names already."""
    for step in (5, 10):
        flip(step_folder(tmp_path, step) / KINDS["weights"])
    (tmp_path / "global_step10.corrupt").mkdir()
    write_latest(tmp_path, "global_step10")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged:\n.*global_step10: layer.*\n.*global_step5: layer"):
        find(Search(directory=tmp_path, own=True))
    assert {"global_step10.corrupt-2", "global_step5.corrupt"} <= {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="which is not there"):
        find(Search(directory=tmp_path, own=True))


def cut(folder: Path) -> None:
    with (folder / KINDS["weights"]).open("r+b") as file:
        file.truncate(100)


def lose(folder: Path) -> None:
    (folder / KINDS["optimizer"]).unlink()


def swap(folder: Path) -> None:
    first, second = (folder / f"layer_0{slot}-model_00-model_states.pt" for slot in (2, 3))
    aside = first.rename(folder / "aside")
    second.rename(first)
    aside.rename(second)


def repeat_manifest(folder: Path) -> None:
    shutil.copy(folder.with_name("global_step5") / MANIFEST, folder / MANIFEST)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, [f"{KINDS['weights']}: 100 bytes, manifest says 1000"]),
        (lose, [f"{KINDS['optimizer']}: missing"]),
        (
            swap,
            [
                "layer_02-model_00-model_states.pt: holds the content of layer_03-model_00-model_states.pt",
                "layer_03-model_00-model_states.pt: holds the content of layer_02-model_00-model_states.pt",
            ],
        ),
        (repeat_manifest, [f"{MANIFEST}: is of step 5, the folder of step 10"]),
    ],
    ids=["truncated", "deleted", "swapped", "stale manifest"],
)
def test_each_damage_has_its_own_words(tmp_path: Path, damage: Callable[[Path], None], told: list[str]) -> None:
    for step in (5, 10):
        step_folder(tmp_path, step)
    damage(tmp_path / "global_step10")
    assert set(told) <= set(look_at(tmp_path / "global_step10", Verify.FULL).problems)
    with pytest.raises(CheckpointError) as refused:
        find(Search(directory=tmp_path))
    assert all(line in refused.value.what for line in told)
    assert find(Search(directory=tmp_path, own=True)) == "global_step5"


@pytest.mark.dist
@pytest.mark.full  # with one flipped bit by default in test_two_runs.py
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world", "pattern", "sizes"),
    [
        (1, "mp_rank_00_model_states.pt", None),
        (2, "*optim_states.pt", None),
        (2, "configs/*.yml", None),
        (2, MANIFEST, None),
        (2, "mp_rank_00_model_states.pt", 1000),
    ],
    ids=["weights", "optimizer", "configs", "manifest", "truncated"],
)
def test_a_run_goes_on_from_the_step_before(tmp_path: Path, world: int, pattern: str, sizes: int | None) -> None:
    """The steps made again are those of the first run, to the last bit."""
    stage = {"zero_optimization": {"stage": 1 if world > 1 else 0}}
    config = settings(tmp_path, world, train_iters=4, checkpoint_factor=2, lr_decay_iters=8, **stage)
    first = Job(tmp_path, config)
    assert first.wait(120) == 0, first.output[-3000:]
    losses = first.losses()
    path = next((first.save / "global_step4").glob(pattern))
    if sizes is None:
        flip(path)
    else:
        with path.open("r+b") as file:
            file.truncate(sizes)
    second = Job(tmp_path, config)
    assert second.wait(120) == 0, second.output[-3000:]
    assert path.name in second.output and "set aside as global_step4.corrupt" in second.output
    assert "starting from iteration 2" in second.output and second.losses() == losses
    assert saved_steps(first.save) == [2, 4] and (first.save / "global_step4.corrupt").is_dir()
