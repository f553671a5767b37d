# SPDX-License-Identifier: Apache-2.0
"""Trains tiny models over every combination of parallel sizes, ZeRO stages and precisions, and compares each with one process.

    python tests/matrix.py --subset                          the few that cover all pairs
    python tests/matrix.py --only 'tp=2 pp=0,2 style=llama'  some of them
    python tests/matrix.py --write                           all, and write documentation/compatibility.md

Leaves with 1 when a combination that is not refused fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from support.matrix_cells import all_cells, selected, subset  # noqa: E402
from support.matrix_run import FAILED, REFUSED, TIMEOUT_S, WORKS, Result, run_cells  # noqa: E402

DOCUMENT = ROOT / "documentation" / "compatibility.md"


def main(argv: list[str] | None = None) -> int:
    """Run and report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="'AXIS=VALUE ...'", help="cells with these values, several after a comma")
    parser.add_argument("--subset", action="store_true", help="the cells that the default tests run")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}; needs all cells")
    parser.add_argument("-j", type=int, default=2, dest="jobs", metavar="N", help="jobs at a time (default 2)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"seconds per job (default {TIMEOUT_S:g})")
    args = parser.parse_args(argv)
    try:
        cells = selected(subset() if args.subset else all_cells(), args.only)
    except ValueError as error:
        parser.error(str(error))
    if args.write and len(cells) < len(all_cells()):
        parser.error("--write needs all cells")

    started, seen = time.monotonic(), []
    own = [cell for cell in cells if args.subset or cell.job == cell or cell.job not in cells]

    def told(result: Result) -> None:
        seen.append(result)
        if result.state != REFUSED:
            print(f"[{len(seen)}/{len(own)}] {result}", flush=True)

    results = run_cells(own, jobs=args.jobs, timeout_s=args.timeout, told=told)
    seconds = time.monotonic() - started
    count = {state: sum(result.state == state for result in results) for state in (WORKS, REFUSED, FAILED)}
    print(f"{', '.join(f'{number} {state}' for state, number in count.items())}; {seconds:.0f} s")
    for result in results:
        if result.state == FAILED:
            print(result)
    if args.write:
        from support.matrix_report import document

        DOCUMENT.write_text(document(results), encoding="utf-8")
        print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    return 1 if count[FAILED] or not results else 0


if __name__ == "__main__":
    sys.exit(main())
