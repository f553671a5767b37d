# SPDX-License-Identifier: Apache-2.0
"""The coordinate check as a command: its files and its exit status."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from support.forkserver import run
from support.tiny import tiny


def check(repo: Path, folder: Path, *words: str, **keys: object) -> subprocess.CompletedProcess[str]:
    config = tiny("llama", optimizer={"type": "Adam", "params": {"lr": 0.02}}, min_lr=0.0, coord_check=True, **keys)
    (folder / "mup.yml").write_text(yaml.safe_dump(config))
    command = [repo / "tools" / "mup" / "coord_check.py", "mup.yml", "--widths", "32,128", "--steps", "4", *words]
    return run(command, cwd=folder, timeout=100)


def test_growth_is_a_failure(repo: Path, tmp_path: Path) -> None:
    mup = {"use_mup": True, "mup_base_hidden_size": 32, "init_method": "normal", "init_method_std": 0.15}
    good = check(repo, tmp_path, **mup)
    assert good.returncode == 0 and "logits: slope" in good.stdout, good.stderr
    assert {path.name for path in (tmp_path / "coord_check").iterdir()} == {"coordinates.json", "coordinates.png"}
    bad = check(repo, tmp_path, "--use_mup", "false", "--output", "other", **mup)
    assert bad.returncode == 1 and "grows with width to the power of" in bad.stderr
    assert (tmp_path / "other" / "coordinates.png").is_file()
    wrong = check(repo, tmp_path, "--widths", "30,60", **mup)
    assert wrong.returncode == 77 and "does not divide hidden_size 30" in wrong.stderr
