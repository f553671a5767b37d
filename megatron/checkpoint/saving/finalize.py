# SPDX-License-Identifier: Apache-2.0
"""Makes a folder of written files a complete one: everything in it is on disk and in its manifest. Knows no content of a file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megatron.atomic_io import Entry, digest_of, sync_folder
from megatron.checkpoint.steps.manifest import Manifest, write_manifest


def complete_folder(folder: Path, manifest: Manifest) -> None:
    """Add to the manifest what else lies in the folder (configs, NVMe copies), and write it last.

    Raises OSError.
    """
    files = dict(manifest.files)
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            folders.append(path)
        elif name not in files:
            files[name] = _on_disk(path)
    for place in reversed(folders):
        sync_folder(place)
    write_manifest(folder, replace(manifest, files=dict(sorted(files.items()))))


def _on_disk(path: Path) -> Entry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest_of(path)
