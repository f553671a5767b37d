# SPDX-License-Identifier: Apache-2.0
"""Names: no two classes share one, retired words do not come back, functions stay within a page."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict

from support.tree import ROOT, relative

RETIRED = """
    mend mended Rewinder Pieces put_away bring_back whole_weight spread_anew Trove trove Wish disturbing.py adopting respreading
    rewinding persistence.py accounting.py forward_check sight.py stream.py blockwise.py data/making data/finished opening.py patience.py
    ledger.py passes.py near.py segment.py draft.py idle.py translate.py world.py payload.py settle.py characters.py watching.py
    locking.py noise.py wire.py reach.py pulse.py Pulse stuck.py launched.py changes.py durable.py completing.py publishing.py hf_address
    hf_store companions.py ahead.py foreign.py comparing.py
""".split()
"""What `documentation/renamed.md` translates: names that nobody from the field would search for."""

ALLOWED = ("CHANGELOG.md", "documentation/renamed.md", "tests/golden", "tests/repo/test_names.py")
LONGEST_FUNCTION = 60


def modules() -> dict[str, ast.Module]:
    return {relative(path): ast.parse(path.read_text()) for path in sorted((ROOT / "megatron").rglob("*.py"))}


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_functions_stay_within_a_page() -> None:
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno > LONGEST_FUNCTION
    ]
    assert not long


def test_retired_names_are_gone() -> None:
    words = [option for word in RETIRED for option in ("-e", word)]
    found = subprocess.run(
        ["git", "grep", "-nwIF", *words, "--", ".", *(f":!{path}" for path in ALLOWED)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode in (0, 1), found.stderr
    assert not found.stdout, found.stdout
