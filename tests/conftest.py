# SPDX-License-Identifier: Apache-2.0
"""Rules every test obeys: one thread, a hard time limit, no silent skip. Knows nothing of what is tested."""

from __future__ import annotations

import faulthandler
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: one OpenMP thread, no network, no colour.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TQDM_DISABLE": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest  # noqa: E402

GRACE_S = 15.0
"""The soft limit (pytest-timeout) raises inside the test; this much later the process is ended from outside Python."""

WORTH_PRELOADING = 8
"""Fewer tests than this start sooner when each imports what it needs."""

STDERR_FD = pytest.StashKey[int]()
NO_REASON = ("", "Skipped", "Skipped: ", "unconditional skip")
ISSUE = re.compile(r"#\d+")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", default=False, help="also run tests marked full (slow)")


def pytest_configure(config: pytest.Config) -> None:
    # Output is captured later; the dump of a hanging test must reach the real one.
    config.stash[STDERR_FD] = os.dup(2)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Import once, before the forks, what most tests import: a forked test then starts in milliseconds, not in seconds.

    Imports only: no tensor is touched, so no thread is started. Where CUDA may be opened, tests import for themselves.
    """
    forks = getattr(session.config.option, "forked", False) and not getattr(session.config.option, "numprocesses", None)
    if not forks or len(session.items) < WORTH_PRELOADING or os.environ.get("DS_ACCELERATOR") != "cpu":
        return
    for name in ("torch.fx.experimental.symbolic_shapes", "deepspeed", "transformers.models.gpt_neox.modeling_gpt_neox"):
        importlib.import_module(name)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR_FD])


def _why_refused(item: pytest.Item) -> str | None:
    """What is wrong with the skip and xfail marks of a test; None when nothing is."""
    for mark in item.iter_markers():
        reason = str(mark.kwargs.get("reason", ""))
        if mark.name == "skip" and not (reason or any(mark.args)):
            return "a skip needs a reason"
        if mark.name == "skipif" and not reason:
            return "a skipif needs a reason"
        if mark.name == "xfail" and not ISSUE.search(reason):
            return "an xfail needs the number of its issue in the reason, such as 'loses precision, #12'"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    refused = [f"{item.nodeid}: {why}" for item in items if (why := _why_refused(item))]
    if refused:
        raise pytest.UsageError("\n".join(refused))
    for item in items:
        if item.get_closest_marker("gpu") is None:
            item.add_marker("cpu")
    if not config.getoption("--full"):
        slow = [item for item in items if item.get_closest_marker("full")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("full")]


def _limit_s(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    if mark is not None:
        return float(mark.args[0] if mark.args else mark.kwargs["timeout"])
    return float(item.config.getoption("--timeout") or item.config.getini("timeout") or 120)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    # Runs in the forked child. A watchdog thread in C: it also ends a test that hangs inside a library.
    if getattr(item.config.option, "forked", False):
        faulthandler.dump_traceback_later(_limit_s(item) + GRACE_S, exit=True, file=item.config.stash[STDERR_FD])
    yield
    # Only after pytest's own setup, without which its teardown fails on a test that is skipped.
    if item.get_closest_marker("gpu"):
        _need_cuda()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _need_cuda() -> None:
    # Asked in the test's own process: a process that has opened CUDA cannot be forked.
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none on this machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report: pytest.TestReport = yield
    if report.skipped and isinstance(report.longrepr, tuple) and not hasattr(report, "wasxfail"):
        said = str(report.longrepr[2]).removeprefix("Skipped: ").strip()
        if said in NO_REASON:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped without a reason"
    if hasattr(report, "wasxfail") and not ISSUE.search(str(report.wasxfail)):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was marked xfail without the number of an issue"
    return report


@pytest.fixture
def repo() -> Path:
    """The root of this repository."""
    return Path(__file__).resolve().parents[1]
