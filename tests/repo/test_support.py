# SPDX-License-Identifier: Apache-2.0
"""The test helpers themselves: ranks talk, fail and are killed as promised; conftest refuses what it should."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from support import forkserver
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


PROGRAM = """
import os, sys, time
print(sys.argv[1:], os.environ.get("GIVEN"), os.getcwd(), flush=True)
print("an error", file=sys.stderr)
time.sleep(float(sys.argv[1]))
sys.exit(7)
"""


def test_programs_are_run_as_from_the_shell(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = forkserver.run([tmp_path / "program.py", "0", "a b"], cwd=tmp_path, timeout=60, env={"GIVEN": "yes"})
    assert (done.returncode, done.stdout, done.stderr) == (7, f"['0', 'a b'] yes {tmp_path}\n", "an error\n")
    with pytest.raises(subprocess.TimeoutExpired):
        forkserver.run([tmp_path / "program.py", "60"], cwd=tmp_path, timeout=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the server that forks programs runs on Linux only")
def test_a_program_ends_with_its_starter(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    starter = os.fork()
    if starter == 0:
        program = forkserver.start([tmp_path / "program.py", "60"], cwd=tmp_path, env=os.environ, log=tmp_path / "log")
        (tmp_path / "pid").write_text(str(program.pid))
        os._exit(0)
    os.waitpid(starter, 0)
    deadline = time.monotonic() + 10
    while not gone(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("style", sorted(STYLES))
def test_tiny_configurations_are_accepted(style):
    from megatron.neox_arguments import NeoXArgs

    first = tiny(style, seed=7, warmup=None)
    assert first["seed"] == 7 and "warmup" not in first and tiny(style)["seed"] == 1234
    first["optimizer"]["params"]["lr"] = 0.0
    assert tiny(style)["optimizer"]["params"]["lr"] == 1.0e-3, "a caller may change its copy"
    args = NeoXArgs.from_dict(tiny(style))
    assert args.model.hidden_size == 64 and args.run.train_batch_size == 4


HEAD = '"""Tests that break a rule each."""\nimport time\nimport pytest\n\n'
REFUSED = {
    "skip_without_reason": ("@pytest.mark.skip", "a skip needs a reason"),
    "skipif_without_reason": ("@pytest.mark.skipif(True, reason='')", "a skipif needs a reason"),
    "xfail_without_issue": ("@pytest.mark.xfail(reason='bad')", "number of its issue"),
}
"""Marks with which no test is run at all: {name: (mark, what is said)}."""
OUTCOMES = {
    "xfail_with_issue": ("@pytest.mark.xfail(reason='bad, #12')", "assert 0", "XFAIL", "bad, #12"),
    "silent_runtime_skip": ("", "pytest.skip()", "FAILED", "skipped without a reason"),
    "runtime_skip": ("", "pytest.skip('no such device here')", "SKIPPED", "no such device here"),
    "soft_limit": ("@pytest.mark.timeout(1)", "time.sleep(30)", "FAILED", "Timeout"),
    "mark_cpu": ("", "assert request.node.get_closest_marker('cpu')", "PASSED", ""),
}
"""{name: (mark, body, outcome, what is said)}."""


def pytest_in(folder, body, conftest):
    """Run one file of tests under this project's settings and the given conftest."""
    (folder / "test_rule.py").write_text(HEAD + body)
    (folder / "conftest.py").write_text(conftest)
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--forked", "-rA", *settings, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_marks_without_a_reason_are_refused(tmp_path):
    body = "\n".join(f"{mark}\ndef test_{name}(): pass\n" for name, (mark, _) in REFUSED.items())
    code, said = pytest_in(tmp_path, body, (ROOT / "tests" / "conftest.py").read_text())
    assert code == pytest.ExitCode.USAGE_ERROR, said
    for name, (_, why) in REFUSED.items():
        assert any(f"test_{name}" in line and why in line for line in said.splitlines()), said


def test_an_unknown_mark_is_refused(tmp_path):
    code, said = pytest_in(tmp_path, "@pytest.mark.cqu\ndef test_x(): pass\n", (ROOT / "tests" / "conftest.py").read_text())
    assert code == pytest.ExitCode.INTERRUPTED and "cqu" in said, said


def test_skips_limits_and_marks_come_out_as_the_rules_say(tmp_path):
    tests = [f"{mark}\ndef test_{name}(request): {body}\n" for name, (mark, body, _, _) in OUTCOMES.items()]
    slow = "@pytest.mark.full\ndef test_full_is_left_out(): assert 0\n"
    code, said = pytest_in(tmp_path, "\n".join([*tests, slow]), (ROOT / "tests" / "conftest.py").read_text())
    assert code == pytest.ExitCode.TESTS_FAILED and "1 deselected" in said and "test_full_is_left_out" not in said, said
    # Skips are told by line, everything else by name.
    told = [line for line in said.splitlines() if line.startswith(("XFAIL", "FAILED", "SKIPPED", "PASSED"))]
    assert len(told) == len(OUTCOMES), said
    for name, (_, _, outcome, why) in OUTCOMES.items():
        assert why in said and any(line.startswith(outcome) and (f"test_{name}" in line or outcome == "SKIPPED") for line in told), said


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
    code, said = pytest_in(tmp_path, body, source.replace("GRACE_S = 15.0", "GRACE_S = 1.0"))
    assert code == 1 and "Timeout" in said and "in test_x" in said, said
