# SPDX-License-Identifier: Apache-2.0
"""What the console shows, read back with the parsers of tests.support.log_lines."""

from __future__ import annotations

import io
import logging
import socket
from pathlib import Path

import pytest
import torch

from megatron.hooks.console import ConsoleHook, memory, tee_log
from megatron.hooks.metrics import StepFlops
from megatron.log import get_logger, setup_logging
from support.fake_engine import drive, result
from tests.support.log_lines import parse_memory, parse_training

FLOPS = StepFlops(hardware=4e12, model=3e12, devices=2, peak_tflops=10.0)


def test_lines_of_an_interval() -> None:
    out = io.StringIO()
    setup_logging(rank=0, stream=out)
    steps = [
        result(2.0),
        result(4.0, metrics={"margin": 1.0, "lm_loss": 4.0}),
        result(float("nan"), skipped=True, loss_scale=1024.0, seconds=1.0),
        result(3.0),
        result(9.0),
    ]
    drive([ConsoleHook(log_interval=2, flops=FLOPS)], steps, start=10)
    lines = out.getvalue().splitlines()
    first, second = (line for line in map(parse_training, lines) if line is not None)
    assert (first.iteration, first.train_iters) == (12, 15)
    assert first.samples_per_second == 8.0 and first.elapsed_ms == 500.0 and first.learning_rate == 1e-3
    assert first.flops == 4e12 and (first.mfu, first.hfu) == (30.0, 40.0)
    assert first.losses == {"lm_loss": 3.0, "margin": 0.5} and first.loss_scale is None
    # A skipped step costs time, is counted, and does not touch the mean.
    assert second.losses == {"lm_loss": 3.0} and (second.skipped, second.nan) == (1, 1) and second.elapsed_ms == 750.0
    assert [parse_memory(line) is not None for line in lines] == [False, True, False]
    assert lines[1].startswith("after 12 iterations memory (MB)")


def test_live_bar_stands_beneath_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bar = io.StringIO()
    setup_logging(rank=0)
    handlers = list(logging.getLogger("megatron").handlers)
    hook = ConsoleHook(log_interval=1, flops=StepFlops(), live=True, stream=bar)
    drive([hook], [result()] * 3, start=5, target=10)
    lines = [line for line in capsys.readouterr().out.splitlines() if parse_training(line)]
    assert "5/10" in bar.getvalue() and len(lines) == 3
    with pytest.raises(ZeroDivisionError):
        drive([ConsoleHook(log_interval=1, flops=StepFlops(), live=True, stream=bar), _Fails()], [result()] * 3)
    assert logging.getLogger("megatron").handlers == handlers  # as before, also after a failure


class _Fails(ConsoleHook):
    """A hook that fails in its first step."""

    def __init__(self) -> None:
        super().__init__(log_interval=1, flops=StepFlops())

    def after_step(self, *_: object) -> None:  # type: ignore[override]
        raise ZeroDivisionError


def test_memory_of_this_process() -> None:
    line = memory(3, torch.device("cpu"))
    assert line.iterations == 3 and 10 < line.allocated < 100_000 and line.max_allocated >= line.allocated


def test_copies_in_a_folder_are_appended(tmp_path: Path) -> None:
    for text in ("one", "two"):
        setup_logging(rank=0, stream=io.StringIO())
        tee_log(tmp_path / "logs")
        tee_log(tmp_path / "logs")
        get_logger("megatron.test").info(text)
        get_logger("megatron.test").warning("careful")
        logging.shutdown()
    host = socket.gethostname()
    assert (tmp_path / "logs" / f"{host}_stdout.txt").read_text() == "one\ncareful\ntwo\ncareful\n"
    assert (tmp_path / "logs" / f"{host}_stderr.txt").read_text() == "careful\ncareful\n"
