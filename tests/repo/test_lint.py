# SPDX-License-Identifier: Apache-2.0
"""ruff, mypy and import-linter accept the tree, so that one test run proves all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.tree import ROOT

BIN = Path(sys.executable).parent


def run(*command: str, timeout_s: float) -> tuple[int, str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    return done.returncode, done.stdout + done.stderr


def test_ruff_accepts_the_tree():
    code, said = run(sys.executable, "-m", "ruff", "check", "--quiet", ".", timeout_s=60)
    assert code == 0, said


@pytest.mark.timeout(400)
def test_mypy_strict_accepts_the_package():
    code, said = run(sys.executable, "-m", "mypy", "--no-error-summary", timeout_s=380)
    assert code == 0, said


def test_import_linter_keeps_the_floors():
    code, said = run(str(BIN / "lint-imports"), timeout_s=60)
    assert code == 0, said
