# SPDX-License-Identifier: Apache-2.0
"""The shell scripts parse, answer --help at once and refuse an unknown option."""

from __future__ import annotations

import os
import subprocess

import pytest

from support.tree import ROOT, files, relative

SCRIPTS = ["setup_uv_env.sh", "run_tests.sh", "quickstart.sh"]


def bash(*command: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def test_every_shell_script_parses():
    scripts = [*map(relative, files(".sh", ".sbatch")), ".ci/run"]
    assert {*SCRIPTS, "pretrain_neox.sbatch"} <= set(scripts)
    for script in scripts:
        done = bash("-n", script)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        assert "set -euo pipefail" in (ROOT / script).read_text(), script


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_answered(script):
    done = bash(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")


def test_a_wrong_option_is_refused():
    done = bash("setup_uv_env.sh", "--nonsense")
    assert done.returncode != 0 and "--nonsense" in done.stderr


def test_setup_refuses_an_interpreter_that_does_not_run(tmp_path):
    shim = tmp_path / "python3.11"
    shim.write_text("#!/bin/sh\necho 'shim: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    done = bash("setup_uv_env.sh", "--python", str(shim))
    assert done.returncode != 0 and "does not run" in done.stderr


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="this machine has a GPU, so a GPU extra is right here")
def test_setup_refuses_gpu_extras_without_a_gpu():
    done = bash("setup_uv_env.sh", "--cpu", "--extra", "flash")
    assert done.returncode != 0 and "needs a GPU" in done.stderr
