# SPDX-License-Identifier: Apache-2.0
"""train.py without deepy.py: torchrun and mpirun start it, and it reads its place from their environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.dist import free_port
from support.tiny import tiny
from support.tree import ROOT

pytestmark = pytest.mark.dist
OUTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DLTS_HOSTFILE", "SLURM_JOB_ID", "SLURM_PROCID")
ROOT_ALLOWED = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    golden = ROOT / "tests" / "golden"
    for suffix in ("bin", "idx"):
        shutil.copy(golden / "train" / "data" / f"corpus_text_document.{suffix}", tmp_path)
    flat: dict[str, Any] = tiny("neox", train_iters=2, global_num_gpus=None, train_batch_size=4, gradient_accumulation_steps=None)
    flat |= {f"{split}_data_paths": [str(tmp_path / "corpus_text_document")] for split in ("train", "valid", "test")}
    flat |= {"vocab_file": str(golden / "tokenizer" / "tokenizer.json")}
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(flat))
    return str(path)


def losses(command: list[str], **more: str) -> list[str]:
    environ = {name: value for name, value in os.environ.items() if name not in OUTER}
    environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Told once: the other rank knows that it is not the first.
    assert done.stdout.count("number of parameters") == 1
    return re.findall(r"lm_loss: (\S+)", done.stdout)


def test_torchrun_starts_two_ranks_that_train_as_one(config: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    train = [str(ROOT / "train.py"), config]
    alone = losses([sys.executable, *train])
    assert len(alone) == 2
    assert [float(loss) for loss in losses([*torchrun, *train])] == pytest.approx([float(loss) for loss in alone], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("program", ["mpirun.openmpi", "mpirun.mpich"])
def test_mpirun_starts_two_ranks(config: str, program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    command = [program, "-n", "2", *(["--oversubscribe"] if "openmpi" in program else []), sys.executable, str(ROOT / "train.py"), config]
    assert len(losses(command, **(ROOT_ALLOWED if os.geteuid() == 0 else {}))) == 2
