# SPDX-License-Identifier: Apache-2.0
"""Training from a Hugging Face model: the first loss is the one transformers computes, and every layout goes on alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed
from support.hf import GOLDEN, fitting, hf_model

STEPS = 2
TIED = {"no_weight_tying": False}
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("neox", {"model_parallel_size": 2, "padded_vocab_size": 640}),
    ("neox", {"pipe_parallel_size": 2}),
    ("neox", {"zero_optimization": {"stage": 3}}),
    ("llama", {**TIED, "model_parallel_size": 2, "sequence_parallel": True, "zero_optimization": {"stage": 1}}),
    ("llama", {**TIED, "pipe_parallel_size": 2}),
    ("llama", {**TIED, "zero_optimization": {"stage": 2}}),
)


def config(kind: str, folder: str, world: int, **changes: Any) -> dict[str, Any]:
    """Four sequences a step of the recorded corpus."""
    corpus = str(GOLDEN / "train" / "data" / "corpus_text_document")
    data = {**{f"{split}_data_paths": [corpus] for split in ("train", "valid", "test")}, "index_map_dir": f"{folder}/maps", "log_dir": None}
    batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": None}
    return fitting(kind, Path(folder, kind), **{"padded_vocab_size": 512, **data, **batch, "global_num_gpus": world, **changes})


def losses(rank: int, world: int, folder: str, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, list[float]]:
    """Of each case the losses of two steps; beside them, in one process, transformers' loss on the first step's tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron.checkpoint.build import choose_source
    from megatron.data.build import build_data
    from megatron.engine.build import build_engine, join_job
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.build import build_objective

    found = {}
    for name, (kind, layout) in cases.items():
        args = NeoXArgs.from_dict(config(kind, folder, world, **layout))
        groups, device = join_job(args)
        objective = build_objective(args, eod=0)
        data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size).train
        batches = data.batches(objective.collate, start_sample=0)
        engine, _ = build_engine(args, choose_source(args, groups.world), groups, device)
        steps = [[next(batches) for _ in range(4 // groups.dp.size)] for _ in range(STEPS)]
        found[name] = [engine.train_step(objective, list(step)).metrics["lm_loss"] for step in steps]
        if world == 1:
            theirs = AutoModelForCausalLM.from_pretrained(Path(folder, kind), attn_implementation="eager").eval()
            tokens, labels = (torch.cat([getattr(batch, field) for batch in steps[0]]) for field in ("tokens", "labels"))
            with torch.no_grad():
                logits = theirs(tokens).logits
            found[f"transformers {name}"] = [torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()]
    return found


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_the_first_loss_is_that_of_transformers(tmp_path: Path) -> None:
    for kind in ("neox", "llama"):
        hf_model(kind, tmp_path / kind)
    cases = {"neox": ("neox", {}), "llama": ("llama", {"zero_optimization": {"stage": 3}})}
    (found,) = run_distributed(losses, 1, 100, init=False, folder=str(tmp_path), cases=cases)
    for kind in cases:
        assert found[kind][0] == pytest.approx(found[f"transformers {kind}"][0], rel=1e-6)


@pytest.mark.full
@pytest.mark.dist
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_every_layout_begins_with_the_same_model(kind: str, layout: dict[str, Any], tmp_path: Path) -> None:
    """Both losses are those of one process: the weights, and what the first step makes of them."""
    hf_model(kind, tmp_path / kind, tie_word_embeddings=kind == "llama")
    model = {key: value for key, value in layout.items() if key in ("padded_vocab_size", *TIED)}
    (alone,) = run_distributed(losses, 1, 80, init=False, folder=str(tmp_path), cases={"it": (kind, model)})
    for found in run_distributed(losses, 2, 100, init=False, folder=str(tmp_path), cases={"it": (kind, layout)}):
        assert found["it"] == pytest.approx(alone["it"], rel=2e-6)
