# SPDX-License-Identifier: Apache-2.0
"""An output folder that appears whole or not at all. Knows nothing of what is in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from megatron.atomic_io import sync_folder
from megatron.errors import CheckpointError

PARTIAL = ".partial"


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where something is at `out` that must not be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError("the output is not a folder", where=str(out), fix="choose another folder")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise CheckpointError("the output folder is not empty", where=str(out), fix="choose another folder, or give --overwrite")


@contextmanager
def written_aside(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Within, fill the folder `<out>.partial`, which then gets its name; after an error it is removed, and `out` is as it was.

    Raises CheckpointError where `out` holds something, unless `overwrite`.
    """
    check_free(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
    aside.mkdir()
    try:
        yield aside
        replace_folder(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_folder(aside: Path, out: Path) -> None:
    """Rename; what was there goes only afterwards."""
    old = out.with_name(f"{out.name}.old.{uuid4().hex[:8]}")
    replaces = out.exists()
    if replaces:
        out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        if replaces:
            old.rename(out)
        raise
    sync_folder(out.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
