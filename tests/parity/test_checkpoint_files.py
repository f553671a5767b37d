# SPDX-License-Identifier: Apache-2.0
"""Files, names, shapes and fused orders are GPT-NeoX's: a recorded checkpoint, read and saved again, is the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from support.dist import run_distributed

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"


def saved_again(rank: int, world: int, folder: str, name: str) -> None:
    """Take the recorded weights, and save them before the first step."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)
    recorded = GOLDEN / name
    place = {"load": str(recorded / "ckpt"), "finetune": True, "save": f"{folder}/run", "extra_save_iters": [0], "log_dir": None}
    changes = {**place, "train_iters": 0, "eval_iters": 0, "index_map_dir": folder, "global_num_gpus": world, "checkpoint_factor": 1000}
    pretrain(NeoXArgs.from_ymls([str(recorded / "config.yml")], overwrites=changes))


def content(path: Path) -> dict[str, Any]:
    """What a file holds, code or not: these files are ours."""
    held: dict[str, Any] = torch.load(path, weights_only=False)
    return held


@pytest.mark.dist
@pytest.mark.timeout(150)
@pytest.mark.parametrize(("name", "world"), [("neox_rpe", 1), ("llama_pp1", 1), ("neox_tp2", 2), ("neox_pp2", 2)])
def test_files_are_those_of_the_reference(tmp_path: Path, name: str, world: int) -> None:
    run_distributed(saved_again, world, 120, init=False, folder=str(tmp_path), name=name)
    ours, theirs = tmp_path / "run" / "global_step0", GOLDEN / name / "ckpt" / "global_step0"
    assert (tmp_path / "run" / "latest").read_text() == "global_step0"
    files = sorted(path.name for path in theirs.glob("*.pt"))
    assert sorted(path.name for path in ours.glob("*.pt") if "optim_states" not in path.name) == files
    compared = 0
    for file in files:
        found, recorded = content(ours / file), content(theirs / file)
        # The recorded files keep the weights alone of what mp_rank files hold.
        found, recorded = (held["module"] if "module" in held else held for held in (found, recorded))
        if recorded is None:
            assert found is None
            continue
        assert set(found) == set(recorded)
        for key, tensor in recorded.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), f"{file}: {key}"
            compared += 1
    assert compared > 10
