# SPDX-License-Identifier: Apache-2.0
"""No code of ours reads a file in a way that lets the file run something. The rules are tried on samples first."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from support.tree import ROOT, relative

MODULES = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal", "shelve", "dill", "cloudpickle", "joblib",
    "torch.distributed.checkpoint", "deepspeed.checkpoint", "deepspeed.utils.zero_to_fp32",
}  # fmt: skip
"""Names that are not imported: each reads pickles without care. DeepSpeed's engine is given a reader of ours instead."""

CALLS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "eval",
    "exec",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "torch.jit.load",
}
SAFE_LOADERS = {"ConfigLoader", "SafeLoader", "yaml.SafeLoader", "CSafeLoader", "yaml.CSafeLoader"}


def imported(node: ast.AST) -> list[str]:
    """Dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def unsafe(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a file that could run what it reads."""
    for node in ast.walk(tree):
        for name in imported(node):
            if any(name == module or name.startswith(f"{module}.") for module in MODULES):
                yield node.lineno, f"import of {name}"
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in CALLS:
            yield node.lineno, called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield node.lineno, f"{called} without allow_pickle=False"
        if called == "yaml.load" and given.get("Loader", *map(ast.unparse, node.args[1:2]) or [""]) not in SAFE_LOADERS:
            yield node.lineno, "yaml.load without a safe loader"
        for flag in ("trust_remote_code", "load_universal", "shell"):
            if given.get(flag) == "True":
                yield node.lineno, f"{flag}=True"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "pickle.loads(text)",
        "from pickle import loads",
        "import joblib",
        "from torch.distributed import checkpoint",
        "from deepspeed.checkpoint.ds_to_universal import main",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_rules_see(line: str) -> None:
    assert list(unsafe(ast.parse(line))), line


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=ConfigLoader)",
        "yaml.load(text, yaml.SafeLoader)",
        "model.eval()",
        "pickle.UnpicklingError",
    ],
)
def test_the_rules_let_pass(line: str) -> None:
    assert not list(unsafe(ast.parse(line))), line


def test_nothing_is_read_without_care() -> None:
    files = [*(ROOT / "megatron").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *ROOT.glob("*.py")]
    assert len(files) > 100
    found = [f"{relative(path)}:{line}: {what}" for path in sorted(files) for line, what in unsafe(ast.parse(path.read_text()))]
    assert not found, found


def test_deepspeed_reads_through_us() -> None:
    """The engine's files are read by our reader, which is put in before anything is loaded."""
    source = (ROOT / "megatron" / "engine" / "deepspeed_runner.py").read_text()
    assert "private.set_checkpoint_engine(self.deepspeed, make)" in source and "make = partial(SafeCheckpointEngine" in source
