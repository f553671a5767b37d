# SPDX-License-Identifier: Apache-2.0
"""Loss curves recorded from GPT-NeoX, replayed by the engine from the recorded weights on the recorded data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.dist import run_distributed

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"
TOLERANCE = 1e-5  # relative

SEQUENTIAL = ("neox_pp0", "neox_rpe", "neox_scalenorm", "neox_seq_norpl_gelu", "neox_bias_gelu_fusion", "neox_pp0_eval")
FAMILIES = ("gpt2_pp0", "llama_pp0", "llama_i768_pp0", "fork_neox_pp0")
PIPELINED = ("neox_pp1", "neox_pp1_gas1", "llama_pp1", "fork_neox_pp1")
PARALLEL = ("neox_tp2", "neox_pp2", "neox_dp2", "neox_dp2_zero1")
POST_NORM = ("fork_olmo3_mha_pp1", "fork_olmo3_gqa_flash_pp1")


def recorded(run: str) -> list[dict[str, Any]]:
    """Per iteration: lm_loss, gradient norm, learning rate after the step."""
    return list(json.loads((GOLDEN / run / "steps.json").read_text(encoding="utf-8")))


def rates(run: str) -> list[float]:
    """Learning rate used in each iteration: the one set after the iteration before."""
    after = [step["lr_after_step"][0] for step in recorded(run)]
    # The fork's schedule starts at 0, upstream's with the first warm-up value.
    return [0.0 if run.startswith("fork_") else after[0], *after[:-1]]


def replay(run: str, maps: Path, **overrides: Any) -> tuple[list[float], list[float], list[float]]:
    """Losses, gradient norms and learning rates of our engine; the recordings are unclipped."""
    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.data.build import build_data
    from megatron.engine.build import build_engine, join_job
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.build import build_objective

    index = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))
    start = GOLDEN / index[run]["initial_weights"]
    args = NeoXArgs.from_ymls(
        [str(GOLDEN / run / "config.yml")],
        overwrites={
            "gradient_clipping": 0.0,
            "padded_vocab_size": 512,
            "index_map_dir": str(maps),
            "attention_over_documents": "joined",
            "save": None,
            "warmup_from_zero": run.startswith("fork_"),
            **overrides,
        },
    )
    groups, device = join_job(args)
    objective = build_objective(args, eod=0)
    data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size)
    engine, _ = build_engine(args, CheckpointSource(Take.WEIGHTS, start.parent, start.name), groups, device)
    batches = data.train.batches(objective.collate, start_sample=0)
    losses, norms, used = [], [], []
    for _ in recorded(run):
        result = engine.train_step(objective, [next(batches) for _ in range(args.run.gradient_accumulation_steps)])
        losses.append(result.metrics["lm_loss"])
        norms.append(result.grad_norm or 0.0)
        used.append(result.learning_rate)
    return losses, norms, used


def assert_replays(run: str, maps: Path, **overrides: Any) -> None:
    """All losses, the first gradient norm and the schedule agree."""
    losses, norms, used = replay(run, maps, **overrides)
    expected = [step["lm_loss"] for step in recorded(run)]
    assert losses == pytest.approx(expected, rel=TOLERANCE), run
    # The reference's pipeline forgets to divide gradients by the accumulation steps.
    double = 2.0 if run in PIPELINED + POST_NORM and run != "neox_pp1_gas1" else 1.0
    assert norms[0] * double == pytest.approx(recorded(run)[0]["grad_l2_this_rank_before_clip"], rel=1e-4), run
    assert used == pytest.approx(rates(run), rel=1e-9), run


@pytest.mark.parametrize("group", [SEQUENTIAL, FAMILIES, PIPELINED, POST_NORM], ids=["sequential", "families", "pipeline", "post_norm"])
@pytest.mark.timeout(240)
def test_curves_of_the_reference(group: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recorded iteration's loss within 1e-5, from the recorded weights and data."""
    monkeypatch.chdir(GOLDEN)
    for run in group:
        assert_replays(run, tmp_path)


def on_a_rank(rank: int, world: int, run: str, maps: str, **overrides: Any) -> tuple[list[float], list[float], list[float]]:
    """One rank of a recorded run of several."""
    os.chdir(GOLDEN)
    # The reference's biases under gpt_j_residual learn faster the more tensor ranks there are.
    return replay(run, Path(maps), summed_bias_full_lr=True, **overrides)


@pytest.mark.dist
@pytest.mark.parametrize("run", PARALLEL)
@pytest.mark.timeout(150)
def test_curves_of_the_reference_at_their_own_layout(run: str, tmp_path: Path) -> None:
    """The recorded weights of every rank are read in place, and every recorded iteration's loss is met within 1e-5 on every rank."""
    for losses, _, used in run_distributed(on_a_rank, 2, 120, init=False, run=run, maps=str(tmp_path)):
        assert losses == pytest.approx([step["lm_loss"] for step in recorded(run)], rel=TOLERANCE)
        assert used == pytest.approx(rates(run), rel=1e-9)


@pytest.mark.parametrize(
    "layout",
    [
        {"pipe_parallel_size": 0},
        {"pipe_parallel_size": 1},
        {"pipe_parallel_size": 0, "data_types": {"grad_accum_dtype": "bf16"}},
        {"pipe_parallel_size": 1, "data_types": {"grad_accum_dtype": "bf16"}},
    ],
    ids=["sequential", "pipeline", "sequential_bf16_sums", "pipeline_bf16_sums"],
)
@pytest.mark.parametrize("run", ["neox_pp0", "gpt2_pp0"])
def test_bfloat16_follows_the_recorded_curve(run: str, layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and the gradient norm over two micro batches are the recorded ones up to rounding, tied or not, in both engines."""
    monkeypatch.chdir(GOLDEN)
    losses, norms, _ = replay(run, tmp_path, precision="bfloat16", **layout)
    assert losses == pytest.approx([step["lm_loss"] for step in recorded(run)], rel=2e-3), run
    assert norms == pytest.approx([step["grad_l2_this_rank_before_clip"] for step in recorded(run)], rel=1e-2), run


def test_sliding_window_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference ignored the window (its curve is the windowless one); without the key we equal it, with the key we do not."""
    monkeypatch.chdir(GOLDEN)
    assert_replays("neox_swa_global", tmp_path, sliding_window_width=None)
    losses, _, _ = replay("neox_swa_global", tmp_path)
    assert losses[0] != pytest.approx(recorded("neox_swa_global")[0]["lm_loss"], rel=TOLERANCE)


def test_masked_micro_batch_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording is NaN from its third iteration on, where a micro batch has no trained token. Ours goes on.

    The reference averages per-micro-batch means, which equals our mean over trained tokens only for equal counts, so the
    first iteration is compared micro batch by micro batch.
    """
    from megatron.engine.engine import TrainEngine

    monkeypatch.chdir(GOLDEN)
    losses, _, _ = replay("sft_packed", tmp_path)
    assert all(0.0 < loss < 7.0 for loss in losses)
    seen: list[float] = []
    original = TrainEngine.train_step

    def by_micro_batch(self: TrainEngine, objective: Any, micro_batches: Any) -> Any:
        if not seen:
            seen.extend(self.eval_step(objective, [batch])["lm_loss"] for batch in micro_batches)
        return original(self, objective, micro_batches)

    monkeypatch.setattr(TrainEngine, "train_step", by_micro_batch)
    replay("sft_packed", tmp_path)
    assert sum(seen) / len(seen) == pytest.approx(recorded("sft_packed")[0]["lm_loss"], rel=TOLERANCE)
