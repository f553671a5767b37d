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


def losses(rank: int, world: int, folder: str, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[list[float], Any]]:
    """Of each case the losses of two steps, and the rows of tokens and labels of this rank's first step."""
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
        rows = [(batch.tokens.tolist(), batch.labels.tolist()) for batch in steps[0]]
        found[name] = ([engine.train_step(objective, list(step)).metrics["lm_loss"] for step in steps], rows)
    return found


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_the_first_loss_is_that_of_transformers(tmp_path: Path) -> None:
    import torch

    theirs = {kind: hf_model(kind, tmp_path / kind) for kind in ("neox", "llama")}
    cases = {"neox": ("neox", {}), "llama": ("llama", {"zero_optimization": {"stage": 3}})}
    (found,) = run_distributed(losses, 1, 100, init=False, folder=str(tmp_path), cases=cases)
    for kind, (ours, rows) in found.items():
        tokens, labels = (torch.tensor([row[part][0] for row in rows]) for part in (0, 1))
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(theirs[kind](tokens).logits.flatten(0, 1), labels.flatten()).item()
        assert ours[0] == pytest.approx(expected, rel=1e-6), kind


def trained(rank: int, world: int, folder: str, kind: str, layout: dict[str, Any]) -> None:
    """Two steps from the model, a checkpoint after each, and two more that take the run up."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    place = {"save": f"{folder}/run", "save_hf": True, "checkpoint_factor": 1, "keep_last_n_checkpoints": 1}
    for target in (2, 4):
        pretrain(NeoXArgs.from_dict(config(kind, folder, world, train_iters=target, lr_decay_iters=4, **{**place, **layout})))


def check_run(folder: Path, steps: tuple[int, ...]) -> None:
    """Every checkpoint was exported, the last one gives the same logits in transformers, and knows where the run began."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron.checkpoint.loading.hf_view import fetch
    from megatron.checkpoint.steps.manifest import problems_of, read_manifest
    from megatron.generation.build import load_model
    from megatron.neox_arguments import NeoXArgs

    run = folder / "run"
    assert sorted(entry.name for entry in (run / "hf").iterdir()) == [f"global_step{step}" for step in steps]
    # One that was still being exported when the last one was saved stays until the next save.
    left = {entry.name for entry in run.glob("global_step*")}
    assert f"global_step{steps[-1]}" in left and not left & {f"global_step{step}" for step in steps[:-2]}
    manifest = read_manifest(run / f"global_step{steps[-1]}")
    assert manifest is not None and not problems_of(run / f"global_step{steps[-1]}", manifest, digests=True)
    began = fetch(f"hf:{folder / 'llama'}")
    assert manifest.origin.items() >= began.told().items() and manifest.origin["architecture"] == "LlamaForCausalLM"
    ours = load_model(NeoXArgs.from_dict(config("llama", str(folder), 1, load=str(run), padded_vocab_size=None))).model
    theirs = AutoModelForCausalLM.from_pretrained(run / "hf" / f"global_step{steps[-1]}", attn_implementation="eager").eval()
    tokens = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(tokens).full()[..., :512]
        assert theirs.config.vocab_size == 512 and (theirs(tokens).logits - expected).abs().max() < 1e-5
        before = AutoModelForCausalLM.from_pretrained(folder / "llama", attn_implementation="eager")(tokens).logits
        assert (before - expected).abs().max() > 1e-3, "it was trained"


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_run_goes_on_from_its_own_checkpoints_and_exports_them(tmp_path: Path) -> None:
    """The model's folder is not needed any more once there is a checkpoint, unless `finetune` says to begin again."""
    hf_model("llama", tmp_path / "llama")
    run_distributed(trained, 1, 100, init=False, folder=str(tmp_path), kind="llama", layout={"checkpoint_async": True})
    check_run(tmp_path, (1, 2, 3, 4))
    from megatron.checkpoint.build import Take, choose_source
    from megatron.neox_arguments import NeoXArgs

    flat = config("llama", str(tmp_path), 1, save=str(tmp_path / "run"), checkpoint_factor=1)
    assert choose_source(NeoXArgs.from_dict(flat)).tag == "global_step4"
    again = choose_source(NeoXArgs.from_dict({**flat, "finetune": True}))
    assert again.take is Take.WEIGHTS and again.hf is not None and again.folder is None


@pytest.mark.full
@pytest.mark.dist
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "layout",
    [
        {"model_parallel_size": 2, "padded_vocab_size": 640},
        {"pipe_parallel_size": 2},
        {"zero_optimization": {"stage": 3}},
    ],
    ids=["tensor", "pipeline", "zero3"],
)
def test_every_layout_exports_the_same_model(layout: dict[str, Any], tmp_path: Path) -> None:
    """Rows that only filled up the vocabulary are not given back."""
    hf_model("llama", tmp_path / "llama")
    run_distributed(trained, 2, 150, init=False, folder=str(tmp_path), kind="llama", layout=layout)
    check_run(tmp_path, (1, 2, 3, 4))


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
        assert found["it"][0] == pytest.approx(alone["it"][0], rel=2e-6)
