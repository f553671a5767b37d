# SPDX-License-Identifier: Apache-2.0
"""What `load`, `save`, `iteration`, `finetune` and `checkpoint_verify` mean together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.build import CheckpointSource, Take, choose_source, own_folder
from megatron.checkpoint.steps.run_lock import LOCK
from megatron.checkpoint.steps.step_dirs import saved_steps, write_latest
from megatron.errors import CheckpointError, ConfigError
from megatron.mpu.groups import Group
from megatron.neox_arguments import NeoXArgs
from support.checkpoints import KINDS, flip, step_folder
from support.tiny import tiny


def args(run: Path, **changes: Any) -> NeoXArgs:
    return NeoXArgs.from_dict(tiny(**{"load": str(run), "save": str(run), "checkpoint_factor": 10, **changes}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 5, 10 and 20, the last damaged."""
    folder = tmp_path / "run"
    for step in (5, 10, 20):
        step_folder(folder, step)
    write_latest(folder, "global_step20")
    flip(folder / "global_step20" / KINDS["weights"])
    return folder


def test_a_run_resumes_itself(run: Path) -> None:
    """Also where the folder is spelled in two ways."""
    assert choose_source(args(run, save=f"{run}/../run/")) == CheckpointSource(Take.EVERYTHING, run, "global_step10")
    assert saved_steps(run) == [5, 10]
    assert choose_source(args(run, iteration=5, no_load_optim=True)) == CheckpointSource(Take.WEIGHTS_AND_POSITION, run, "global_step5")
    assert saved_steps(run) == [5]


@pytest.mark.parametrize("changes", [{"save": None}, {"save": "elsewhere"}, {"finetune": True}, {"iteration": 20}], ids=str)
def test_nothing_is_passed_over_for_others(run: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"global_step20 is damaged(.|\n)*`iteration: 10`"):
        choose_source(args(run, **changes))
    assert saved_steps(run) == [5, 10, 20]
    source = choose_source(args(run, checkpoint_verify="size", **changes))
    assert (source.tag, saved_steps(run)) == ("global_step20", [5, 10, 20])


def test_a_start_from_nothing(tmp_path: Path) -> None:
    assert choose_source(args(tmp_path / "run")) == choose_source(args(tmp_path, load=None)) == CheckpointSource(Take.NOTHING)
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        choose_source(args(tmp_path / "run", save=str(tmp_path / "other")))
    (tmp_path / "run" / "global_step5.corrupt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        choose_source(args(tmp_path / "run"))


def test_a_folder_is_one_runs_and_cleared_up(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "global_step20").rename(run / "global_step20.partial")
    with own_folder(args(run), Group.single()) as check:
        check()
        assert json.loads((run / LOCK).read_text())["pid"] > 0 and not (run / "global_step20.partial").exists()
        assert "removed global_step20.partial" in caplog.text
        with pytest.raises(ConfigError, match="another run writes"), own_folder(args(run), Group.single()):
            pass
    assert not (run / LOCK).exists()
    with own_folder(args(run, save=None), Group.single()) as check:
        check()
    assert not (run / LOCK).exists()
