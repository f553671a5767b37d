# SPDX-License-Identifier: Apache-2.0
"""Which version of the code this is, by package and git."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code_version() -> str:
    """The package's version, and the git commit where it lies in a checkout; git itself is not asked."""
    try:
        name = version("megatron-neox")
    except PackageNotFoundError:
        name = "unknown"
    commit = git_commit(Path(__file__).resolve().parents[1])
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
