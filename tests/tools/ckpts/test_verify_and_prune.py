# SPDX-License-Identifier: Apache-2.0
"""The tools that verify and prune checkpoints, as they are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.steps.step_dirs import saved_steps
from megatron.errors import CheckpointError, ConfigError
from support.checkpoints import KINDS, flip, step_folder
from support.tree import ROOT


def tool(name: str, *words: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr. The tools run without torch: it is not to be found."""
    blocked = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = {[name, *map(str, words)]!r}; "
    code = f"{blocked}runpy.run_path({str(ROOT / 'tools' / 'ckpts' / name)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (9, 10, 20, 30):
        step_folder(tmp_path, step, manifest=step != 9)
    return tmp_path


def test_verify(run: Path) -> None:
    assert tool("verify.py", run)[:2] == (
        0,
        "global_step9: no manifest: cannot be verified\n" + "".join(f"global_step{step}: whole (5 files)\n" for step in (10, 20, 30)),
    )
    flip(run / "global_step20" / KINDS["weights"])
    (run / "global_step30" / KINDS["optimizer"]).unlink()
    status, told, _ = tool("verify.py", run)
    assert status == 1 and told.splitlines()[2:] == [
        "global_step20: bad",
        f"    {KINDS['weights']}: content differs (xxh128)",
        "global_step30: bad",
        f"    {KINDS['optimizer']}: missing",
    ]
    assert tool("verify.py", run / "global_step20", "--sizes")[:2] == (0, "global_step20: whole (5 files)\n")
    assert tool("verify.py", f"{run / 'global_step20'}/")[0] == 1
    status, _, told = tool("verify.py", run / "global_step20" / "configs")
    assert status == CheckpointError.exit_code and "no global_step<N> folder" in told and "Traceback" not in told
    assert "--sizes" in tool("verify.py", "--help")[1]


def test_prune(run: Path) -> None:
    words = ("--keep", "1", "--keep-every", "9", "--protect", "10")
    status, told, _ = tool("prune.py", f"{run}/", *words, "--dry-run")
    assert status == 0 and told.splitlines() == [f"would delete {run}/global_step20", "1 would go; left: 9, 10, 30"]
    assert saved_steps(run) == [9, 10, 20, 30]
    assert tool("prune.py", run, *words)[1].splitlines()[-1] == "1 deleted; left: 9, 10, 30"
    assert saved_steps(run) == [9, 10, 30]
    flip(run / "global_step30" / KINDS["weights"])
    assert tool("prune.py", run, "--keep", "1", "--dry-run")[1].splitlines()[-1] == "1 would go; left: 10, 30"
    assert tool("prune.py", run, "--keep", "1", "--sizes", "--dry-run")[1].splitlines()[-1] == "2 would go; left: 30"
    status, _, told = tool("prune.py", run / "elsewhere", "--keep", "1")
    assert status == 77 and "no global_step<N> folder" in told
    status, _, told = tool("prune.py", run, "--keep", "0")
    assert status == ConfigError.exit_code and "--keep 0" in told
