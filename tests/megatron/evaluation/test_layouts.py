# SPDX-License-Identifier: Apache-2.0
"""`deepy.py eval.py` gives the losses of one process at any layout, as a person would call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.jobs import Job
from support.tiny import tiny

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2},
    "pipeline": {"pipe_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "data": {},
}


def losses(folder: Path, ranks: int, layout: dict[str, Any], *, launched: bool = False) -> dict[str, Any]:
    """The results that eval.py writes for the recorded checkpoint."""
    data = str(GOLDEN / "train" / "data" / "corpus_text_document")
    config = tiny(
        "neox",
        global_num_gpus=ranks,
        load=str(GOLDEN / "train" / "neox_pp0" / "ckpt"),
        vocab_file=str(GOLDEN / "tokenizer" / "tokenizer.json"),
        index_map_dir=str(folder),
        eval_iters=2,
        eval_results_prefix=str(folder / "of"),
        save=str(folder / "run"),
        checkpoint_factor=1000,
        train_batch_size=4,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=None,
        **{f"{split}_data_paths": [data] for split in ("train", "valid", "test")},
        **layout,
    )
    job = Job(folder, config, script="eval.py", launched=launched)
    assert job.wait(100) == 0, job.output[-3000:]
    (written,) = folder.glob("of*eval_results_*.json")
    return dict(json.loads(written.read_text())["results"])


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    alone = losses(tmp_path / "alone", 1, {})
    assert set(alone) == {"validation", "test"} and alone["validation"]["lm_loss"] > 1
    for name, layout in LAYOUTS.items():
        # Once as a person calls it, through deepy.py.
        found = losses(tmp_path / name, 2, layout, launched=name == "tensor")
        for split, metrics in alone.items():
            assert found[split] == pytest.approx(metrics, rel=1e-5), (name, split)
