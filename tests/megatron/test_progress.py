# SPDX-License-Identifier: Apache-2.0
"""Round trips of every fixed line, the fixed shapes, and the expressions other tools search with."""

from __future__ import annotations

import doctest
import math
import re
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron import progress
from megatron.progress import EvaluationBlock, MemoryLine, TrainingLine
from tests.support import log_lines

KNOWN = (
    " samples/sec: 53.120 | iteration     1200/    4627 | elapsed time per iteration (ms): 2409.6 | learning rate: 8.000E-05 |"
    " approx flops per GPU: 290.3TFLOPS | lm_loss: 1.234567E+00 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def test_the_line_is_the_known_line() -> None:
    line = TrainingLine(
        samples_per_second=53.12,
        iteration=1200,
        train_iters=4627,
        elapsed_ms=2409.6,
        learning_rate=8e-5,
        flops=290.3e12,
        losses={"lm_loss": 1.234567},
    )
    assert progress.format_training(line) == KNOWN
    assert log_lines.parse_training(KNOWN) == line
    assert log_lines.parse_training("[rank 0] 2026-01-01 00:00:00,1 INFO " + KNOWN) == line
    assert log_lines.parse_training("iteration 5: hello") is None and log_lines.parse_training("") is None


def test_the_expressions_of_other_tools() -> None:
    line = progress.format_training(
        TrainingLine(
            samples_per_second=1.0,
            iteration=42,
            train_iters=100,
            elapsed_ms=10.0,
            learning_rate=1e-4,
            flops=1e13,
            mfu=29.0,
            hfu=38.0,
            losses={"rewards margin": 0.1, "lm_loss": 2.5},
            loss_scale=65536.0,
        )
    )
    assert re.search(r"iteration.*lm_loss", line)
    assert re.findall(r"iteration\s+([0-9]+)", line)[0] == "42"
    assert re.findall(r"iteration\s+[0-9]+/\s*([0-9]+)", line) == ["100"]
    assert re.findall(r"lm_loss:\s*([0-9.E+-]+)", line) == ["2.500000E+00"]
    assert line.startswith(" samples/sec") and line.endswith(" |") and " | MFU: 29.00% | HFU: 38.00% | rewards margin:" in line
    assert " | lm_loss: 2.500000E+00 | loss scale: 65536.0 | number of skipped iterations:   0 |" in line


names = st.sampled_from(["lm_loss", "reward acc", "kl", "chosen_rewards"])
finite = st.floats(-1e20, 1e20) | st.sampled_from([math.nan, math.inf])
positive = st.floats(1e-3, 1e9)
training_lines = st.builds(
    TrainingLine,
    samples_per_second=positive,
    iteration=st.integers(0, 10**10),
    train_iters=st.integers(0, 10**10),
    elapsed_ms=positive,
    learning_rate=st.floats(1e-12, 10),
    flops=st.floats(0, 1e26),
    mfu=st.none() | st.floats(0, 100),
    hfu=st.none() | st.floats(0, 100),
    losses=st.dictionaries(names, finite, max_size=3),
    loss_scale=st.none() | st.floats(1, 1e9),
    skipped=st.integers(0, 5000),
    nan=st.integers(0, 5000),
)


@given(training_lines)
def test_training_line_round_trip(line: TrainingLine) -> None:
    text = progress.format_training(line)
    parsed = log_lines.parse_training(text)
    assert parsed is not None and "\n" not in text
    assert progress.format_training(parsed) == text or line.flops > 999.9  # 999.96K prints as 1000.0K, and is read as 1.0M
    assert (parsed.iteration, parsed.train_iters, parsed.skipped, parsed.nan) == (line.iteration, line.train_iters, line.skipped, line.nan)
    assert list(parsed.losses) == list(line.losses)
    assert parsed.losses == pytest.approx(dict(line.losses), rel=1e-6, nan_ok=True)
    assert parsed.flops == pytest.approx(line.flops, rel=0.06, abs=0.06)


@given(st.dictionaries(st.sampled_from(["lm_loss", "margin", "lm_loss_ppl"]), finite, max_size=3), st.integers(0, 10**6))
def test_evaluation_round_trip(metrics: dict[str, float], iteration: int) -> None:
    for prefix in (f"iteration {iteration}", "the end of training for val data"):
        text = progress.format_evaluation(EvaluationBlock("validation", prefix, metrics))
        above, line, below = text.split("\n")
        assert above == below == "-" * (len(line) + 1) and line.startswith(" validation results at ")
        parsed = log_lines.parse_evaluation(text)
        assert parsed is not None and (parsed.chart, parsed.prefix) == ("validation", prefix)
        assert parsed.metrics == pytest.approx(metrics, rel=1e-6, nan_ok=True)


def test_evaluation_has_the_known_shape() -> None:
    block = EvaluationBlock("validation", "iteration 10", {"lm_loss": 2.0, "lm_loss_ppl": progress.perplexity(2.0)})
    middle = progress.format_evaluation(block).split("\n")[1]
    assert middle == " validation results at iteration 10 | lm_loss value: 2.000000E+00 | lm_loss_ppl value: 7.389056E+00 | "
    assert progress.perplexity(1e5) == math.inf
    assert log_lines.parse_evaluation(KNOWN) is None


def test_the_other_lines() -> None:
    memory = MemoryLine(10, 1.5, 2.0, 3.25, 4.0)
    text = progress.format_memory(memory)
    assert text == "after 10 iterations memory (MB) | allocated: 1.5 | max allocated: 2.0 | reserved: 3.25 | max reserved: 4.0"
    assert log_lines.parse_memory(text) == memory and log_lines.parse_memory(KNOWN) is None
    times = {"forward": 1.5, "backward-allreduce": 0.25}
    assert progress.format_times(times) == "time (ms) | forward: 1.50 | backward-allreduce: 0.25"
    assert log_lines.parse_times(progress.format_times(times)) == times
    assert log_lines.parse_times("time (ms)") == {} and log_lines.parse_times(KNOWN) is None
    now = datetime(2026, 1, 2, 3, 4, 5)
    leaving = progress.format_exit(3, 17, now)
    assert leaving == "rank: 3 | time: 2026-01-02 03:04:05 | exiting the program at iteration 17"
    assert log_lines.parse_exit(leaving) == (3, 17, now)


def test_doctests() -> None:
    found = doctest.testmod(progress)
    assert found.attempted >= 2 and found.failed == 0
