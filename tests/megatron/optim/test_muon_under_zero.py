# SPDX-License-Identifier: Apache-2.0
"""Muon through DeepSpeed trains what our own trains, also where a share of ZeRO ends inside a matrix; and resumes exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "train"
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "bfloat16": {"precision": "bfloat16", "zero_optimization": {"stage": 1}},
}


def compared(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Layout -> per weight the cosine and the ratio of lengths of what three steps changed, beside our own Muon; and of the resumed run."""
    import torch

    from megatron.checkpoint.neox_store import read_weights
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

    def weights(name: str, step: int) -> dict[str, torch.Tensor]:
        return {key: value.float() for key, value in read_weights(Path(folder) / name / f"global_step{step}").items()}

    def change(name: str) -> dict[str, torch.Tensor]:
        start = weights(name, 0)
        return {key: value - start[key] for key, value in weights(name, 3).items() if value.dim() > 1}

    run("own", 3)
    own, found = change("own"), {}
    for name, layout in LAYOUTS.items():
        run(name, 3, **layout)
        run(f"{name}_halves", 2, **layout)
        run(f"{name}_halves", 3, **layout)
        whole, halves = weights(name, 3), weights(f"{name}_halves", 3)
        made = change(name)
        found[name] = {
            "cosine": min(float(torch.cosine_similarity(own[key].flatten(), made[key].flatten(), dim=0)) for key in own),
            "length": max(abs(float(made[key].norm() / own[key].norm()) - 1) for key in own),
            "resumed": all(torch.equal(whole[key], halves[key]) for key in whole),
        }
    return found


@pytest.mark.timeout(200)
def test_deepspeeds_muon_is_ours(tmp_path: Path) -> None:
    """With two micro batches a step, which Muon must see as one."""
    first, second = run_distributed(compared, world=2, timeout_s=180, init=False, folder=str(tmp_path))
    assert first == second
    for name, found in first.items():
        assert found["cosine"] > 0.98 and found["length"] < 0.03, (name, found)
        assert found["resumed"], name
