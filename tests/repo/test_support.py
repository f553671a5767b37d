# SPDX-License-Identifier: Apache-2.0
"""The test helpers themselves: ranks talk, fail and are killed as promised; conftest refuses what it should."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from support.dist import DistributedFailure, run_distributed
from support.tiny import STYLES, tiny
from support.tree import ROOT


def sum_of_ranks(rank, world, start):
    import torch

    value = torch.tensor(float(start + rank))
    torch.distributed.all_reduce(value)
    return value.item()


def fail_on_one(rank, world):
    if rank == 1:
        raise ValueError("the cause is here")
    time.sleep(60)


def hang(rank, world, pids):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (pids / f"{rank}").write_text(str(child.pid))
    time.sleep(60)


@pytest.mark.dist
def test_ranks_talk_to_each_other():
    assert run_distributed(sum_of_ranks, world=2, start=10) == [21.0, 21.0]


@pytest.mark.dist
def test_first_failing_rank_is_shown_and_the_rest_is_killed():
    started = time.monotonic()
    with pytest.raises(DistributedFailure, match="rank 1 of 2 failed[^$]*the cause is here"):
        run_distributed(fail_on_one, world=2, init=False)
    assert time.monotonic() - started < 30


def gone(pid: int) -> bool:
    try:
        state = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.dist
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for left-over processes in /proc, which this system has not")
def test_a_hanging_rank_is_killed_with_all_it_started(tmp_path):
    with pytest.raises(DistributedFailure, match="did not end within 4 s[^$]*hang"):
        run_distributed(hang, world=2, timeout_s=4, init=False, pids=tmp_path)
    deadline = time.monotonic() + 5
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))


@pytest.mark.parametrize("style", sorted(STYLES))
def test_tiny_configurations_are_accepted(style):
    from megatron.neox_arguments import NeoXArgs

    first = tiny(style, seed=7, warmup=None)
    assert first["seed"] == 7 and "warmup" not in first and tiny(style)["seed"] == 1234
    first["optimizer"]["params"]["lr"] = 0.0
    assert tiny(style)["optimizer"]["params"]["lr"] == 1.0e-3, "a caller may change its copy"
    args = NeoXArgs.from_dict(tiny(style))
    assert args.model.hidden_size == 64 and args.run.train_batch_size == 4


RULES = '''
"""Tests that break a rule each."""
import time
import pytest

{body}
'''
CASES = {
    "skip_without_reason": ("@pytest.mark.skip\ndef test_x(): pass", 4, "a skip needs a reason"),
    "xfail_without_issue": ("@pytest.mark.xfail(reason='bad')\ndef test_x(): assert 0", 4, "number of its issue"),
    "xfail_with_issue": ("@pytest.mark.xfail(reason='bad, #12')\ndef test_x(): assert 0", 0, "1 xfailed"),
    "silent_runtime_skip": ("def test_x(): pytest.skip()", 1, "skipped without a reason"),
    "runtime_skip": ("def test_x(): pytest.skip('no such device here')", 0, "1 skipped"),
    "soft_limit": ("@pytest.mark.timeout(1)\ndef test_x(): time.sleep(30)", 1, "Timeout"),
    "mark_cpu": ("def test_x(request): assert request.node.get_closest_marker('cpu')", 0, "1 passed"),
    "full_is_left_out": ("@pytest.mark.full\ndef test_x(): assert 0", 5, "1 deselected"),
    "unknown_mark": ("@pytest.mark.cqu\ndef test_x(): pass", 2, "cqu"),
}


def pytest_in(folder, body, conftest):
    """Run one file of tests under this project's settings and the given conftest."""
    (folder / "test_rule.py").write_text(RULES.format(body=body))
    (folder / "conftest.py").write_text(conftest)
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--forked", *settings, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("case", sorted(CASES))
def test_conftest_rules(case, tmp_path):
    body, code, said = CASES[case]
    done = pytest_in(tmp_path, body, (ROOT / "tests" / "conftest.py").read_text())
    assert done.returncode == code and said in done.stdout + done.stderr, done.stdout + done.stderr


def test_the_watchdog_ends_a_test_that_hangs_outside_python(tmp_path):
    # Signals are blocked, so pytest-timeout's alarm never arrives: as in a dead-locked library call.
    body = """
@pytest.mark.timeout(1)
def test_x():
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)
"""
    source = (ROOT / "tests" / "conftest.py").read_text()
    assert "GRACE_S = 15.0" in source
    done = pytest_in(tmp_path, body, source.replace("GRACE_S = 15.0", "GRACE_S = 1.0"))
    assert done.returncode == 1 and "Timeout" in done.stderr and "in test_x" in done.stderr, done.stdout + done.stderr
