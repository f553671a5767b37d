# SPDX-License-Identifier: Apache-2.0
"""Text, logits and losses of a checkpoint are those of one process, whatever layout reads it; each rank holds its part only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed
from support.tiny import tiny

GOLDEN = Path(__file__).parents[2] / "golden"
TRAIN = GOLDEN / "train"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"model_parallel_size": 2}),
    "pp2": (2, {"pipe_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2_pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2}),
}


def results(rank: int, world: int, *, folder: str, keys: dict[str, Any]) -> dict[str, Any]:
    """What one rank makes: logits in a file, greedy and sampled texts in files, and how many parameters it held."""
    import numpy as np

    from megatron.generation.build import build_writer, joined, load_model, whole_rows
    from megatron.generation.modes import input_file, write_logits
    from megatron.neox_arguments import NeoXArgs

    def arguments(**more: Any) -> NeoXArgs:
        given = {"load": str(TRAIN / "neox_pp0" / "ckpt"), "vocab_file": str(GOLDEN / "tokenizer" / "tokenizer.json"), **keys}
        return NeoXArgs.from_dict(tiny("neox", global_num_gpus=world, **given, **more))

    here = Path(folder)
    prompts = here / "prompts"
    if rank == 0:
        prompts.write_text("import os\nThe\n", encoding="utf-8")
        np.save(here / "tokens.npy", np.load(TRAIN / "fixed_tokens.npy")[:2])
    told = {}
    with joined(arguments()) as (groups, device):
        from megatron.mpu.collectives import barrier

        barrier(groups.world)
        model = load_model(arguments(), whole_rows(groups), device).model
        told["parameters"] = sum(p.numel() for p in model.parameters())
        write_logits(model, here / "tokens.npy", here / "logits.npy", rows=2, write=rank == 0)
        for name, sampling in (("greedy", {}), ("again", {"recompute": True}), ("sampled", {"temperature": 1.0, "top_k": 20})):
            writer = build_writer(arguments(maximum_tokens=6, **sampling), groups, device)
            input_file(writer, prompts, "\n", here / f"{name}.jsonl")
    return told


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_logits_and_texts_are_those_of_one_process(layout: str, tmp_path: Path) -> None:
    import numpy as np

    world, keys = LAYOUTS[layout]
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    [alone] = run_distributed(results, 1, 120.0, init=False, folder=str(tmp_path / "one"), keys={})
    told = run_distributed(results, world, 200.0, init=False, folder=str(tmp_path / "many"), keys=keys)
    np.testing.assert_allclose(np.load(tmp_path / "many" / "logits.npy"), np.load(tmp_path / "one" / "logits.npy"), atol=1e-5)
    for name in ("greedy", "again", "sampled"):
        assert texts(tmp_path / "many" / f"{name}.jsonl") == texts(tmp_path / "one" / f"{name}.jsonl"), name
    if layout != "cp2":
        assert all(rank["parameters"] < 0.75 * alone["parameters"] for rank in told)
