# SPDX-License-Identifier: Apache-2.0
"""Laws that import-linter cannot say: who may see NeoXArgs and how, and who may name DeepSpeed's pipeline."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.tree import ROOT, relative

PACKAGE = ROOT / "megatron"
DOORS = re.compile(r"build(_\w+)?\.py|cli\.py|__main__\.py")
ENTRANCES = {"megatron/training.py"}
PIPELINE = {"megatron/model/pipeline.py", "megatron/engine/micro_batches.py"}


def trees(pattern: str = "*.py") -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob(pattern)):
        yield path, ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module or name that a file imports, dotted; also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_door(path: Path) -> bool:
    """An objective reads its own keys, in `from_args`."""
    inside = PACKAGE / "neox_arguments"
    return (
        bool(DOORS.fullmatch(path.name)) or relative(path) in ENTRANCES or inside in path.parents or PACKAGE / "objectives" in path.parents
    )


def test_only_doors_see_the_configuration():
    seen = [relative(path) for path, tree in trees() if not is_door(path) and any("neox_arguments" in name for name in imported(tree))]
    assert not seen, f"take numbers or a small frozen value instead of NeoXArgs: {seen}"


def test_nobody_inside_reads_the_flat_view():
    from megatron.neox_arguments import NeoXArgs

    known = set(dir(NeoXArgs)) | set(getattr(NeoXArgs, "__annotations__", {})) | set(getattr(NeoXArgs, "model_fields", {}))
    found = []
    for path, tree in trees():
        if PACKAGE / "neox_arguments" in path.parents:
            continue
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            names = {a.arg for a in every if a.annotation is not None and "NeoXArgs" in ast.unparse(a.annotation)}
            for node in ast.walk(function):
                if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                    continue
                if node.value.id in names and node.attr not in known:
                    found.append(f"{relative(path)}:{node.lineno}: {node.value.id}.{node.attr}")
    assert not found, "name the section (args.model.hidden_size): " + ", ".join(sorted(set(found)))


def test_deepspeed_pipe_has_two_doors():
    pipe = ("deepspeed.pipe", "deepspeed.runtime.pipe")
    seen = [relative(p) for p, tree in trees() if relative(p) not in PIPELINE and any(n.startswith(pipe) for n in imported(tree))]
    assert not seen, seen


def test_every_folder_is_a_package_with_a_quiet_face():
    loud = []
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        face = folder / "__init__.py"
        if not face.exists():
            loud.append(f"{relative(folder)} has no __init__.py")
            continue
        allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
        loud += [f"{relative(face)}:{n.lineno}" for n in ast.parse(face.read_text()).body if not isinstance(n, allowed)]
    assert not loud, loud
