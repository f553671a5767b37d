# SPDX-License-Identifier: Apache-2.0
"""No path of one cluster, machine or person in code, scripts, configs or documents."""

from __future__ import annotations

import re
from pathlib import Path

from support.tree import files, relative

ROOTS = ("projects", "home", "root", "Users", "lus", "gpfs", "lustre", "mnt", "scratch", "work", "fsx", "weka")
SITE = re.compile(r"(?<![\w.$}>~-])/(?:" + "|".join(ROOTS) + r")/[A-Za-z0-9_]")
HERE = Path(__file__).resolve()


def test_no_path_of_one_site():
    found = []
    for path in files(".py", ".sh", ".sbatch", ".yml", ".yaml", ".toml", ".cfg", ".md", ".txt", ""):
        if path == HERE or relative(path).startswith("configs/sites/"):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if SITE.search(line):
                found.append(f"{relative(path)}:{number}: {line.strip()[:120]}")
    assert not found, "use a flag, the environment or configs/sites/:\n" + "\n".join(found)


def test_the_rule_sees_what_it_should():
    assert SITE.search("x = '/projects/a/data'") and SITE.search("cd /home/me/run") and SITE.search("path: /scratch/x")
    assert not SITE.search("${DIR}/home/x") and not SITE.search("https://example.org/home/x") and not SITE.search("docs/work/x")
