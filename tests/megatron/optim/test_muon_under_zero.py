# SPDX-License-Identifier: Apache-2.0
"""Muon through DeepSpeed trains what our own trains, also where a share of ZeRO ends inside a matrix; and resumes exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "train"
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3, "reduce_scatter": False}},
    "bfloat16": {"precision": "bfloat16", "zero_optimization": {"stage": 1}},
}


def compared(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Layout -> losses of four steps, the same of a run in two halves, and how what was learned lies beside what our own Muon learns."""
    import torch

    from megatron.checkpoint.formats.neox_files import read_weights
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    os.chdir(GOLDEN)
    # DeepSpeed compiles Muon's update, which would take this test most of a minute.
    torch.compiler.set_stance("force_eager")
    common = {
        # Three layers: with two, the data ranks' shares end where parameters end, and no matrix is cut.
        **{"num_layers": 3, "attention_config": [[["global"], 3]], "global_num_gpus": world, "gradient_clipping": 0.0},
        **{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": None, "index_map_dir": folder},
        **{"optimizer": {"type": "Muon", "params": {"lr": 0.001, "muon_lr": 0.02}}, "extra_save_iters": [0], "lr_decay_iters": 8},
    }

    def run(name: str, steps: int, **layout: Any) -> None:
        save = {"save": f"{folder}/{name}", "load": f"{folder}/{name}", "train_iters": steps}
        pretrain(NeoXArgs.from_ymls(["neox_pp0/config.yml"], overwrites={**common, **save, **layout}))

    def losses(name: str) -> list[float]:
        rows = map(json.loads, (Path(folder) / name / "metrics.jsonl").read_text().splitlines())
        return [row["lm_loss"] for row in rows if "lm_loss" in row]

    def change(name: str) -> dict[str, torch.Tensor]:
        start, end = (read_weights(Path(folder) / name / f"global_step{step}") for step in (0, 4))
        return {key: end[key].float() - start[key].float() for key in end if end[key].dim() > 1}

    run("own", 4)
    own, found = change("own"), {"own": {"losses": losses("own")}}
    for name, layout in LAYOUTS.items():
        run(name, 4, **layout)
        run(f"{name}_halves", 2, **layout)
        run(f"{name}_halves", 4, **layout)
        found[name] = {"losses": losses(name), "halves": losses(f"{name}_halves")}
        if name != "zero3":  # its weights lie in pieces
            made = change(name)
            found[name]["cosine"] = min(float(torch.cosine_similarity(own[key].flatten(), made[key].flatten(), dim=0)) for key in own)
            found[name]["length"] = max(abs(float(made[key].norm() / own[key].norm()) - 1) for key in own)
    return found


@pytest.mark.timeout(200)
def test_deepspeeds_muon_is_ours(tmp_path: Path) -> None:
    """With two micro batches a step, which Muon must see as one."""
    found = run_distributed(compared, world=2, timeout_s=180, init=False, folder=str(tmp_path))[0]
    own = found.pop("own")["losses"]
    assert len(own) == 4 and own[3] < own[0]
    for name, one in found.items():
        assert one["losses"] == pytest.approx(own, rel=1e-3 if name == "bfloat16" else 1e-4), name
        assert one["halves"] == one["losses"], f"{name}: resume"
        assert one.get("cosine", 1.0) > 0.98 and one.get("length", 0.0) < 0.03, (name, one)
