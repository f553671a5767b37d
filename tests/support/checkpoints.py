# SPDX-License-Identifier: Apache-2.0
"""Step folders for tests of what is around a checkpoint's content, and damage done to them. Opens no tensor."""

from __future__ import annotations

import random
from pathlib import Path

from megatron.atomic_io import digest_of
from megatron.checkpoint.steps.manifest import MANIFEST, Manifest, write_manifest

KINDS = {
    "weights": "layer_02-model_00-model_states.pt",
    "optimizer": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "bookkeeping": "mp_rank_00_model_states.pt",
    "configs": "configs/model.yml",
    "manifest": MANIFEST,
}
"""Kind of file -> a file of a folder that `step_folder` makes."""


def step_folder(directory: Path, step: int, *, manifest: bool = True) -> Path:
    """`directory/global_step<step>` with a file of every kind, whose content depends on the step."""
    folder = directory / f"global_step{step}"
    chance = random.Random(step)
    (folder / "configs").mkdir(parents=True)
    for number, name in enumerate((*KINDS.values(), "layer_03-model_00-model_states.pt")):
        if name != MANIFEST:
            (folder / name).write_bytes(chance.randbytes(1000 if name.startswith("layer") else 400 + number))
    if manifest:
        seal(folder)
    return folder


def manifest_of(folder: Path, step: int | None = None) -> Manifest:
    """A manifest that fits what is in the folder now."""
    files = {path.relative_to(folder).as_posix(): digest_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return Manifest(
        step=int(folder.name.removeprefix("global_step").partition(".")[0]) if step is None else step,
        run_id="test",
        files={name: entry for name, entry in files.items() if name != MANIFEST},
        samples=0,
        tokens=0,
        layout={"pipe": 0, "tensor": 1, "context": 1, "data": 1, "zero_stage": 0, "precision": "fp32", "pipelined": False},
        code_version="test",
        config={"lr": 1e-3, "name": "\u00e9"},
        data={},
        written="2000-01-01T00:00:00+00:00",
    )


def seal(folder: Path) -> None:
    """Give the folder a manifest of what is in it, unless it has one."""
    if not (folder / MANIFEST).exists():
        write_manifest(folder, manifest_of(folder))


def flip(path: Path, bit: int | None = None) -> int:
    """Turn over one bit of a file (by default one in its middle); returns which."""
    bit = path.stat().st_size * 4 if bit is None else bit
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
    return bit
