# SPDX-License-Identifier: Apache-2.0
"""Rules every test obeys: one thread, a hard time limit, no silent skip; and which tests run in a process of their own."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import sys
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

from support import forkserver  # noqa: E402

GRACE_S = 15.0
"""The soft limit (pytest-timeout) raises inside the test; this much later the process is ended from outside Python."""

SHARED = (
    "repo",
    "megatron/hub",
    "megatron/launch",
    "megatron/neox_arguments",
    "megatron/test_atomic_io.py",
    "megatron/test_progress.py",
    "megatron/test_tool_flags.py",
)
"""Rooms and files under tests/ whose tests share the process that collects them. Every other test is forked."""

THREADED = ("torch", "tokenizers", "gigatoken", "pyarrow")
"""Libraries with pools of threads, not for a test that shares its process: what is forked later would wait for threads that are gone."""

FORK = pytest.mark.forked
HERE = Path(__file__).resolve().parent
WORTH_PRELOADING = 8
"""Fewer forked tests than this start sooner when each imports what it needs."""

STDERR_FD = pytest.StashKey[int]()
SERVER = pytest.StashKey[contextlib.ExitStack]()
PRELOADED = pytest.StashKey[bool]()
LOG = pytest.StashKey[tuple[list[logging.Handler], int, bool]]()
BEFORE = pytest.StashKey[tuple[set[str], str, dict[str, str]]]()
NO_REASON = ("", "Skipped", "Skipped: ", "unconditional skip")
ISSUE = re.compile(r"#\d+")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", default=False, help="also run tests marked full (slow)")


def pytest_configure(config: pytest.Config) -> None:
    # Output is captured later; the dump of a hanging test must reach the real one.
    config.stash[STDERR_FD] = os.dup(2)
    config.stash[SERVER] = contextlib.ExitStack()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        config.stash[SERVER].enter_context(forkserver.serving())


def _is_forked(item: pytest.Item) -> bool:
    return item.get_closest_marker("forked") is not None or bool(getattr(item.config.option, "forked", False))


def _shares_a_process(path: Path) -> bool:
    if HERE not in path.parents:
        return False
    inside = path.relative_to(HERE).as_posix()
    return any(inside == room or inside.startswith(f"{room}/") for room in SHARED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    preloaded = item.config.stash.setdefault(PRELOADED, False)
    if _is_forked(item) and not preloaded:
        item.config.stash[PRELOADED] = True
        forked = sum(map(_is_forked, item.session.items))
        if forked >= WORTH_PRELOADING and os.environ.get("DS_ACCELERATOR") == "cpu":
            # A forked test then starts in milliseconds. Imports only: no tensor is touched, so no thread is started. Where CUDA may
            # be opened, tests import for themselves.
            forkserver.preload()
    return (yield)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR_FD])
    config.stash[SERVER].close()


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
        if not _shares_a_process(item.path):
            item.add_marker(FORK)
    # First those that share a process, before anything heavy is imported into it.
    items.sort(key=_is_forked)
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
    item.stash[BEFORE], item.stash[LOG] = _shared_state(), _log_state()
    # Runs in the forked child or in xdist's worker. A watchdog thread in C: it also ends a test that hangs inside a library.
    if _is_forked(item) or "PYTEST_XDIST_WORKER" in os.environ:
        faulthandler.dump_traceback_later(_limit_s(item) + GRACE_S, exit=True, file=item.config.stash[STDERR_FD])
    yield
    # Only after pytest's own setup, without which its teardown fails on a test that is skipped.
    if item.get_closest_marker("gpu"):
        _need_cuda()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if not _is_forked(item):
        _restore(item)
    return result


def _shared_state() -> tuple[set[str], str, dict[str, str]]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {name for name in THREADED if name in sys.modules}, os.getcwd(), environ


def _log_state() -> tuple[list[logging.Handler], int, bool]:
    logger = logging.getLogger("megatron")
    return list(logger.handlers), logger.level, logger.propagate


def _restore(item: pytest.Item) -> None:
    """Folder, environment and log as they were before the test; libraries are refused whose threads a later fork would not survive."""
    modules, folder, environ = item.stash[BEFORE]
    now_modules, now_folder, now_environ = _shared_state()
    logger = logging.getLogger("megatron")
    logger.handlers[:], level, logger.propagate = item.stash[LOG]
    logger.setLevel(level)
    if now_folder != folder:
        os.chdir(folder)
    if now_environ != environ:
        os.environ.clear()
        os.environ.update(environ)
    if now_modules > modules:
        raise AssertionError(f"this test imports {sorted(now_modules - modules)}: take its file out of SHARED in {__file__}")


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
