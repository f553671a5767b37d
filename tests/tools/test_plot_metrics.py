# SPDX-License-Identifier: Apache-2.0
"""The picture of a run and its one-line summary."""

from __future__ import annotations

import doctest
import importlib.util
import json

import pytest


@pytest.fixture
def plot(repo):
    spec = importlib.util.spec_from_file_location("plot_metrics", repo / "tools" / "plot_metrics.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_draws_and_reports(plot, tmp_path, capsys):
    rows = [{"iteration": 0, "valid_lm_loss": 8.0}]
    rows += [{"iteration": i, "lm_loss": 8.0 - i / 10} for i in range(1, 21)]
    rows += [{"iteration": 20, "valid_lm_loss": 4.0}]
    write(tmp_path / "metrics.jsonl", rows, tail='{"iteration": 21, "lm_l')
    assert plot.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "validation loss 8.0000 (iteration 0) -> 4.0000 (iteration 20), 50.0% lower" in said
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.glob("*.tmp.*")] == []


def test_a_resumed_run_counts_the_later_row(plot, tmp_path):
    rows = [{"iteration": 1, "lm_loss": 9.0}, {"iteration": 2, "lm_loss": 8.0}, {"iteration": 2, "lm_loss": 7.5}]
    run = plot.read_run(write(tmp_path / "m.jsonl", rows))
    assert run.train.rows() == ([1, 2], [9.0, 7.5])
    assert "training loss 9.0000" in plot.summary(run)


def test_says_what_is_wrong(plot, tmp_path, capsys):
    assert plot.main([str(tmp_path / "none.jsonl")]) == 1
    assert "cannot read" in capsys.readouterr().err
    broken = tmp_path / "broken.jsonl"
    broken.write_text('oops\n{"iteration": 1, "lm_loss": 1.0}\n')
    assert plot.main([str(broken)]) == 1 and "broken.jsonl:1" in capsys.readouterr().err
    empty = write(tmp_path / "empty.jsonl", [{"iteration": 1}])
    assert plot.main([str(empty)]) == 1 and "neither" in capsys.readouterr().err


def test_worked_example(plot):
    assert doctest.testmod(plot).failed == 0 and doctest.testmod(plot).attempted > 0
