# SPDX-License-Identifier: Apache-2.0
"""A checkpoint rewritten for another layout has the same numbers, is taken up like any other, and costs little memory to make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import CheckpointError
from support.forkserver import run
from support.tree import ROOT

GOLDEN = ROOT / "tests" / "golden" / "train"
TOOL = ROOT / "tools" / "ckpts" / "reshard.py"


def trained(folder: Path, steps: int, **overrides: Any) -> list[float]:
    """Losses of the recorded configuration, trained in this process, from folder/NAME on."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)
    place = {"save": str(folder), "load": str(folder), "index_map_dir": str(folder), "train_iters": steps, "lr_decay_iters": 8}
    given = {"extra_save_iters": None, "checkpoint_factor": 100, "eval_iters": 0, "log_dir": None, **place, **overrides}
    pretrain(NeoXArgs.from_ymls(["neox_pp0/config.yml"], overwrites=given))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["lm_loss"] for row in rows if "lm_loss" in row]


def spread(source: Path, target: Path, tensor: int, pipe: int) -> str:
    """Run the tool."""
    asked = [str(source), str(target), "--tensor", str(tensor), "--pipe", str(pipe), "--config", "neox_pp0/config.yml"]
    ended = run([TOOL, *asked], cwd=GOLDEN, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.timeout(400)
def test_there_and_back_again(tmp_path: Path) -> None:
    """One rank -> two tensor ranks of two stages -> one rank; the run goes on from either as if nothing had happened."""
    import torch

    from megatron.checkpoint.formats.optimizer_files import read_optimizer
    from megatron.checkpoint.formats.torch_file import read_torch_file
    from megatron.checkpoint.loading.merge_tp import read_shards
    from megatron.checkpoint.steps.manifest import Verify
    from megatron.checkpoint.steps.step_dirs import survey

    start = tmp_path / "start"
    trained(start, 2)
    assert "2 tensor ranks, 2 stages" in spread(start, tmp_path / "four", 2, 2)
    spread(tmp_path / "four", tmp_path / "back", 1, 0)
    for name in ("four", "back"):
        (finding,) = survey(tmp_path / name, Verify.FULL).values()
        assert finding.whole and (tmp_path / name / "latest").read_text() == "global_step2"
    folders = [tmp_path / name / "global_step2" for name in ("start", "four", "back")]
    first, four, back = ([*read_shards(folder)] for folder in folders)
    assert len(four) == 2 and four[0]["2.mlp.linear1.weight"].shape[0] * 2 == first[0]["2.mlp.linear1.weight"].shape[0]
    assert set(first[0]) == set(back[0]) and all(torch.equal(first[0][name], back[0][name]) for name in first[0])
    ours, others = read_optimizer(folders[0])[0], read_optimizer(folders[2])[0]
    for key, state in ours.states.items():
        assert set(state) == set(others.states[key]) and all(torch.equal(state[name], others.states[key][name]) for name in state)
    assert dict(ours.scalars) == dict(others.scalars)
    # What the file is for others: NeoX's names, the client state, the stages' files.
    assert sorted(path.name for path in folders[1].glob("mp_rank*")) == [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(4)]
    contents = [read_torch_file(folder / "mp_rank_00_model_states.pt", deepspeed_types=True) for folder in folders]
    assert list(contents[2]["module"]) == list(contents[0]["module"]) and contents[1]["args"]["model_parallel_size"] == 2
    assert all(torch.equal(content["torch_rng_state"], contents[0]["torch_rng_state"]) for content in contents)
    with pytest.raises(CheckpointError, match="of this step already"):
        from megatron.checkpoint.loading.reshard import Target, reshard

        reshard(folders[0], tmp_path / "four", None, Target(tensor=1, pipe=0))  # type: ignore[arg-type]
    expected = trained(start, 4)[2:]
    for name in ("four", "back"):
        assert trained(tmp_path / name, 4) == pytest.approx(expected, rel=1e-6 if name == "four" else 0)


MEASURED = """
import resource, sys
from pathlib import Path
import deepspeed, torch
from megatron.checkpoint.formats.torch_file import save_streaming
from support.large import spec_of_large, write_large
from megatron.checkpoint.loading.reshard import Target, reshard
save_streaming([torch.ones(2)], Path(sys.argv[1]) / "first.pt")  # what is imported for it
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path(sys.argv[1])
reshard(folder / "from" / "global_step1", folder / "to", spec_of_large(), Target(tensor=2, pipe=2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.full
@pytest.mark.timeout(400)
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """270 MB are rewritten in 70 to 120: what was read is let go of."""
    from support.large import write_large

    size = write_large(tmp_path / "from" / "global_step1")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    grown = int(ended.stdout.split()[-1]) * 1024
    written = sum(entry.stat().st_size for entry in (tmp_path / "to" / "global_step1").iterdir() if entry.is_file())
    assert size > 250 << 20 and written > 0.95 * size
    print(f"{grown >> 20} MiB for {size >> 20} MiB")
    assert grown < size / 2
