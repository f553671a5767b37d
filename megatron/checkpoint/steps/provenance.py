# SPDX-License-Identifier: Apache-2.0
"""What a manifest says of where a checkpoint came from: the code's version, and a configuration without secrets. Knows no run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credentials?)(_id)?$", re.IGNORECASE)
_SHORTEST = 6


def code_version() -> str:
    """The package's version, and the git commit where it lies in a checkout; git itself is not asked."""
    try:
        name = version("megatron-neox")
    except PackageNotFoundError:
        name = "unknown"
    commit = git_commit(Path(__file__).resolve().parents[2])
    return f"{name}+g{commit[:12]}" if commit else name


def git_commit(root: Path) -> str | None:
    """The commit that is checked out in `root`; None where it is no checkout, or one that cannot be read."""
    try:
        place = root / ".git"
        if place.is_file():
            place = root / place.read_text().partition("gitdir:")[2].strip()
        head = (place / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head or None
        ref = head.partition(":")[2].strip()
        # A linked worktree keeps its branches with the main one.
        common = place / (place / "commondir").read_text().strip() if (place / "commondir").exists() else place
        if (common / ref).exists():
            return (common / ref).read_text().strip() or None
        packed = (common / "packed-refs").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), None)


def without_secrets(config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A configuration in which neither a key that names a secret, nor a secret of the environment, shows its value.

    >>> without_secrets({"tokenizer_type": "HF", "env": {"HF_TOKEN": "hf_1234567"}, "note": "use hf_1234567"}, {"HF_TOKEN": "hf_1234567"})
    {'tokenizer_type': 'HF', 'env': {'HF_TOKEN': '(hidden)'}, 'note': 'use (hidden)'}
    """
    environ = os.environ if environ is None else environ
    known = [value for name, value in environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST]
    return {str(key): _hidden(str(key), value, known) for key, value in config.items()}


def _hidden(key: str, value: Any, known: list[str]) -> Any:
    if _SECRET.search(key) and isinstance(value, str):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(name): _hidden(str(name), item, known) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(key, item, known) for item in value]
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, HIDDEN)
    return value
