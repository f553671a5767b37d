# SPDX-License-Identifier: Apache-2.0
"""Checking a configuration or asking for help must not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.tree import ROOT

HEAVY = ("torch", "deepspeed", "transformers", "numpy")


@pytest.mark.parametrize("module", ["megatron.neox_arguments", "megatron.neox_arguments.cli", "megatron.progress", "megatron.log"])
def test_import_is_light(module):
    code = f"import sys, time, {module}; print([m for m in {HEAVY!r} if m in sys.modules], time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    heavy, _, seconds = done.stdout.strip().rpartition(" ")
    assert heavy == "[]", f"{module} imports {heavy}"
    assert float(seconds) < 2.0, f"{module} takes {seconds} CPU seconds to import"


LAUNCHER_HELP = f"""
import runpy, sys
sys.argv = ["deepy.py", "--help"]
try:
    runpy.run_path("deepy.py", run_name="__main__")
    code = 0
except SystemExit as end:
    code = end.code or 0
print([m for m in {HEAVY!r} if m in sys.modules], code)
"""


def test_launcher_help_is_light():
    done = subprocess.run([sys.executable, "-c", LAUNCHER_HELP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[] 0", done.stdout
