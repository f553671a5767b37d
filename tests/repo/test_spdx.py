# SPDX-License-Identifier: Apache-2.0
"""Every source file names its licence once, at the top, and every Python module says what it holds."""

from __future__ import annotations

import ast

from support.tree import ROOT, files, relative

TAG = "SPDX-License-" + "Identifier:"


def test_every_source_file_names_its_licence_once_at_the_top():
    wrong = []
    sources = [*files(".py", ".sh", ".sbatch"), ROOT / ".ci" / "run"]
    for path in sources:
        lines = path.read_text().splitlines()
        at = [number for number, line in enumerate(lines) if line.startswith("# " + TAG)]
        if len(at) != 1 or at[0] > 2 or not lines[at[0]].endswith(" Apache-2.0"):
            wrong.append(relative(path))
    assert sources and not wrong, wrong


def test_every_module_opens_with_a_docstring():
    bare = [relative(path) for path in files(".py") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not bare, bare


def test_source_is_ascii():
    odd = []
    for path in files(".py", ".sh", ".sbatch", ".toml"):
        odd += [f"{relative(path)}:{n}" for n, line in enumerate(path.read_text().splitlines(), 1) if not line.isascii()]
    assert not odd, odd
