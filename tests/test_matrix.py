# SPDX-License-Identifier: Apache-2.0
"""The compatibility matrix: a set of cells that covers all pairs, all cells with --full, and that the harness notices what is wrong."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest

from support.dist import DistributedFailure
from support.matrix_cells import AXES, MOST_RANKS, Cell, all_cells, covering, pairs_of, refusal, selected, subset
from support.matrix_report import digits, refusals
from support.matrix_run import FAILED, REFUSED, WORKS, Result, judge, run_cells

ROOT = Path(__file__).resolve().parents[1]


def test_the_subset_covers_all_pairs_that_are_valid_together():
    chosen = subset()
    together = {pair for cell in chosen for pair in pairs_of(cell)}
    assert all(refusal(cell) is None and cell.world <= MOST_RANKS for cell in chosen)
    # Independently of how the set was chosen: for each pair of values, look for a valid cell among all.
    valid = [cell for cell in all_cells() if cell.world <= MOST_RANKS and refusal(cell) is None]
    for (a, of_a), (b, of_b) in combinations(AXES.items(), 2):
        for x, y in product(of_a, of_b):
            possible = any(getattr(cell, a) == x and getattr(cell, b) == y for cell in valid)
            assert possible == (((a, x), (b, y)) in together), (a, x, b, y)
    assert chosen == subset(), "the same every time"
    assert len(chosen) <= 40


def test_covering_takes_few():
    cells = [Cell(tp=tp, cp=cp, pp=pp) for tp in (1, 2) for cp in (1, 2) for pp in (1, 2)]
    assert len(covering(cells)) <= 5, "an orthogonal array has four rows"


def test_cells_are_selected_by_their_values():
    assert selected(all_cells(), "tp=2 pp=0,1 style=llama zero=3 sp=1 cp=1 precision=fp32 recompute=none") == [
        Cell(style="llama", tp=2, sp=1, pp=0, zero=3),
        Cell(style="llama", tp=2, sp=1, pp=1, zero=3),
    ]
    for wrong in ("tp", "tp=3", "size=1"):
        with pytest.raises(ValueError, match=r"tp|size"):
            selected(all_cells(), wrong)


def test_what_is_refused_is_meant_and_documented():
    """A new refusal must be listed here, and the page written anew."""
    results = []
    for cell in all_cells():
        expected = set()
        if cell.pp >= 1 and cell.zero >= 2:
            expected.add(f"(pipe_parallel_size {cell.pp}) does not work with ZeRO stage {cell.zero}")
        if cell.recompute == "selective" and cell.zero == 3:
            expected.add("checkpoint_granularity selective makes wrong gradients with ZeRO stage 3")
        lines = (refusal(cell) or "").splitlines()
        assert len(lines) == len(expected) and all(any(part in line for line in lines) for part in expected), (cell, lines)
        if lines and cell.job == cell:
            results.append(Result(cell=cell, state=REFUSED, reason="\n".join(lines)))
    page = (ROOT / "documentation" / "compatibility.md").read_text(encoding="utf-8")
    assert refusals(results) in page, "run python tests/matrix.py --write"
    assert f"{len(results)} are refused, 0 fail" in page


def test_digits_round_up():
    assert [digits(x) for x in (0.0, 1.0e-7, 1.2e-7, 9.9e-8, 0.05)] == ["0", "1e-7", "2e-7", "1e-7", "5e-2"]


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_cells_that_cover_all_pairs_equal_one_process():
    _require_all_work(run_cells(subset()))


@pytest.mark.dist
@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_cell_equals_one_process_or_is_refused():
    _require_all_work(run_cells([cell for cell in all_cells() if cell.job == cell]))


def _require_all_work(results: list[Result]) -> None:
    failed = [result for result in results if result.state == FAILED]
    assert not failed, "\n\n".join(map(str, failed))
    assert any(result.state == WORKS for result in results)


FAULTY = {
    # Cells of one precision each, so that both bands are shown to be narrow enough.
    Cell(style="llama", tp=2): "no tensor sums",
    Cell(style="llama", tp=2, precision="bf16"): "no tensor sums",
    Cell(style="llama", tp=2, cp=2, precision="bf16"): "no input gradient sums",
    Cell(style="gpt2", zero=2, precision="bf16"): "half the gradient",
}


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_wrong_sharding_fails_in_both_precisions():
    results = run_cells(list(FAULTY), faults=FAULTY)
    assert [(result.state, "is off by" in result.reason) for result in results] == [(FAILED, True)] * len(FAULTY), results


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_hanging_dying_and_failing_cells_fail_alone():
    """Each is ended and told with the end of its log; the same job has the same numbers before and after them."""
    first, last = Cell(style="llama", zero=1), Cell(style="llama", zero=1, sp=1)
    faults = {Cell(style="llama", tp=2): "hang", Cell(style="llama", pp=2): "die", Cell(style="llama", cp=2): "raise"}
    results = run_cells([first, *faults, last], jobs=1, timeout_s=20, faults=faults)
    assert [result.state for result in results] == [WORKS, FAILED, FAILED, FAILED, WORKS], results
    hung, died, raised = (result.reason for result in results[1:4])
    assert hung.startswith("4 ranks did not end within 20 s") and "in _hang" in hung
    assert died.startswith("rank 0 of 4 failed (exit -6)") and "in _die" in died
    assert raised.startswith("rank 3 of 4 failed (exit 1)") and "a fault on purpose" in raised
    assert first.job == last.job and replace(results[0], cell=last, seconds=0) == replace(results[4], seconds=0)


def test_judge_sees_what_differs():
    from support.matrix_rank import Outcome

    cell = Cell()
    truth = Outcome(losses=(6.0, 5.0), norms=(2.0, 1.0), evaluation=4.0, initial={"a": "1"}, drift=0.0, seconds=1.0)
    assert judge(cell, replace(truth, losses=(6.0, 5.000004)), truth).state == WORKS
    wrong = {
        "loss": replace(truth, losses=(6.0, 5.00001)),
        "loss is off": replace(truth, evaluation=float("nan")),
        "norm": replace(truth, norms=(2.0001, 1.0)),
        "drift": replace(truth, drift=1e-3),
        "1 of 2 steps": replace(truth, norms=(2.0,)),
        "other initial weights: a": replace(truth, initial={"a": "2"}),
        "other initial weights: b": replace(truth, initial={"a": "1", "b": "1"}),
        "different copies of a": replace(truth, unequal=("a",)),
        "not done": DistributedFailure("not done"),
    }
    for text, outcome in wrong.items():
        result = judge(cell, outcome, truth)
        assert result.state == FAILED and text in result.reason, (text, result)
    assert judge(cell, truth, DistributedFailure("broken")).state == FAILED
