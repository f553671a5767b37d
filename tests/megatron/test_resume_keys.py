# SPDX-License-Identifier: Apache-2.0
"""What a resume takes up, leaves out and says, key by key, on the recorded corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(autouse=True)
def _in_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)


def run(tmp_path: Path, save: str, load: str | None = None, **overrides: Any) -> Any:
    """Train the tiny recorded configuration in this process, from tmp_path/load to tmp_path/save."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    values = {
        "index_map_dir": str(tmp_path / "maps"),
        "lr_decay_iters": 12,
        "save": str(tmp_path / save),
        "load": str(tmp_path / load) if load else None,
        "extra_save_iters": None,
        "checkpoint_factor": 100,
        "eval_iters": 0,
        "log_dir": None,
    }
    return pretrain(NeoXArgs.from_ymls([str(GOLDEN / "neox_pp0" / "config.yml")], overwrites={**values, **overrides}))


def column(tmp_path: Path, save: str, name: str) -> dict[int, float]:
    """{iteration: value} of metrics.jsonl."""
    rows = [json.loads(line) for line in (tmp_path / save / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[name] for row in rows if "lm_loss" in row}


def kept(tmp_path: Path, save: str) -> dict[str, Any]:
    """What the newest checkpoint holds beside weights."""
    from megatron.checkpoint.formats.neox_files import bookkeeping
    from megatron.checkpoint.steps.step_dirs import find_tag

    return bookkeeping(tmp_path / save / find_tag(tmp_path / save), deepspeed_types=True)


def adam(lr: float) -> dict[str, Any]:
    return {"optimizer": {"type": "Adam", "params": {"lr": lr, "betas": [0.9, 0.95]}}}


@pytest.mark.parametrize("optimizer", ["taken", pytest.param("anew", marks=pytest.mark.full)])
def test_the_rate_of_the_next_steps_follows_the_schedule_that_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    """Also where the optimizer begins anew: its schedule goes on."""
    run(tmp_path, "whole", train_iters=9, **adam(1e-3))
    run(tmp_path, "new", train_iters=9, **adam(4e-3), lr_decay_style="linear", min_lr=3e-4)
    run(tmp_path, "start", train_iters=4, **adam(1e-3))
    old, new = column(tmp_path, "whole", "learning_rate"), column(tmp_path, "new", "learning_rate")
    changed = {**adam(4e-3), "lr_decay_style": "linear", "min_lr": 3e-4}
    common = {"train_iters": 9, "no_load_optim": optimizer == "anew"}

    def rates(name: str, **overrides: Any) -> dict[int, float]:
        run(tmp_path, name, "start", **common, **overrides)
        return column(tmp_path, name, "learning_rate")

    def after(rates: dict[int, float]) -> dict[int, float]:
        return {step: rate for step, rate in rates.items() if step > 4}

    assert rates("same", **adam(1e-3)) == after(old)
    assert rates("override", **changed, override_lr_scheduler=True) == after(new)
    told = capsys.readouterr().out
    assert "follows the schedule of the configuration" in told
    for line in (
        "optimizer.params.lr: 0.001 in the checkpoint, 0.004 in the configuration",
        "lr_decay_style: cosine in the checkpoint, linear in",
    ):
        assert line in told
    assert rates("checkpoint", **changed, use_checkpoint_lr_scheduler=True) == after(old)
    assert "follows the schedule of the checkpoint" in capsys.readouterr().out
    if optimizer == "anew":
        assert rates("neither", **changed) == after(new)
        return
    with pytest.raises(ConfigError, match="lr_decay_style: cosine in the checkpoint, linear in the configuration"):
        rates("neither", **changed)


def test_random_states_are_kept_and_taken_unless_told_otherwise(tmp_path: Path) -> None:
    run(tmp_path, "whole", train_iters=4, **DROPOUT)
    run(tmp_path, "start", train_iters=2, **DROPOUT)
    run(tmp_path, "bare", train_iters=2, no_save_rng=True, **DROPOUT)
    assert "torch_rng_state" in kept(tmp_path, "start") and "torch_rng_state" not in kept(tmp_path, "bare")
    run(tmp_path, "taken", "start", train_iters=4, **DROPOUT)
    run(tmp_path, "left", "start", train_iters=4, no_load_rng=True, **DROPOUT)
    with pytest.raises(CheckpointError, match="no random state in the checkpoint"):
        run(tmp_path, "lacking", "bare", train_iters=4, **DROPOUT)
    run(tmp_path, "without", "bare", train_iters=4, no_load_rng=True, **DROPOUT)
    whole, taken, left, without = (column(tmp_path, name, "lm_loss") for name in ("whole", "taken", "left", "without"))
    assert taken == {3: whole[3], 4: whole[4]}
    # Other neurons are dropped from the first step on; a run without states begins as any run does.
    assert left[3] != whole[3] and left == without


def test_optimizer_and_position_are_taken_as_asked(tmp_path: Path) -> None:
    run(tmp_path, "whole", train_iters=5, checkpoint_factor=2)
    whole = column(tmp_path, "whole", "lm_loss")
    # An older step of the same folder.
    state = run(tmp_path, "older", "whole", iteration=2, train_iters=4)
    assert (state.iteration, state.samples, state.tokens) == (4, 16, 16 * 64)
    assert column(tmp_path, "older", "lm_loss") == {3: whole[3], 4: whole[4]}
    # The same weights and data, so the same loss; but the step from there has no moments.
    state = run(tmp_path, "anew", "whole", iteration=2, train_iters=4, no_load_optim=True)
    assert (state.iteration, state.samples, state.tokens) == (4, 16, 16 * 64)
    anew = column(tmp_path, "anew", "lm_loss")
    assert anew[3] == whole[3] and anew[4] != whole[4]
    # Weights only: steps, samples and rate are those of a new run.
    state = run(tmp_path, "tuned", "whole", iteration=2, train_iters=1, finetune=True)
    assert (state.iteration, state.samples, state.tokens) == (1, 4, 4 * 64)
    tuned = column(tmp_path, "tuned", "lm_loss")
    assert tuned[1] not in whole.values() and tuned[1] < whole[1]
    assert column(tmp_path, "tuned", "learning_rate")[1] == column(tmp_path, "whole", "learning_rate")[1]


def test_counts_and_tracker_ids_go_on(tmp_path: Path) -> None:
    run(tmp_path, "run", "run", train_iters=2)
    first = kept(tmp_path, "run")["run_state"]
    run(tmp_path, "run", "run", train_iters=5)
    second = kept(tmp_path, "run")["run_state"]
    assert (first["samples"], first["tokens"]) == (8, 8 * 64) and (second["samples"], second["tokens"]) == (20, 20 * 64)
    assert len(first["kept"]["tracker_ids"]["wandb"]) == 8 and second["kept"]["tracker_ids"] == first["kept"]["tracker_ids"]
    assert second["kept"]["data"] == first["kept"]["data"]


def test_what_a_resume_changes_is_told_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "run", "run", train_iters=2)
    capsys.readouterr()
    run(tmp_path, "run", "run", train_iters=3)
    # A longer run is a change, and the only one.
    assert changes_in(capsys.readouterr().out) == ["train_iters: 2 in the checkpoint, 3 now"]
    settings = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}, "gradient_clipping": 0.5}
    state = run(tmp_path, "run", "run", train_iters=4, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, **settings)
    assert state.samples == 3 * 4 + 2
    told = changes_in(capsys.readouterr().out)
    assert set(told) >= {
        "train_iters: 3 in the checkpoint, 4 now",
        "train_batch_size: 4 in the checkpoint, 2 now",
        "train_micro_batch_size_per_gpu: 2 in the checkpoint, 1 now",
        "gradient_clipping: 1.0 in the checkpoint, 0.5 now",
        "optimizer.betas: [0.9, 0.95] in the checkpoint, [0.9, 0.99] now",
    }
    assert not any(line.startswith(("lr", "seed", "seq_length", "weight_decay")) for line in told)


def changes_in(output: str) -> list[str]:
    """The lines under the warning."""
    _, _, after = output.partition("with other settings than the checkpoint's:\n")
    return [line.strip() for line in after.splitlines() if line.startswith("  ") and line.endswith(" now")]
