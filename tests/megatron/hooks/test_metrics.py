# SPDX-License-Identifier: Apache-2.0
"""Rows of metrics.jsonl, and what trackers receive, read back from their own files."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron.errors import BackendError
from megatron.hooks.metrics import ClosingHook, MetricsFile, MetricsHook, StepFlops, step_values
from megatron.hooks.trackers import (
    CometSink,
    Guarded,
    TensorBoardSink,
    WandbSink,
    require,
    wandb_key_found,
)
from megatron.hooks.validation import ValidationHook
from megatron.log import setup_logging
from support.fake_engine import drive, result

FLOPS = StepFlops(hardware=4e12, model=3e12, devices=2, peak_tflops=10.0)


class ListSink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed: bool | None = None

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def close(self, *, failed: bool = False) -> None:
        self.closed = failed


def hooks(path: Path, sink: ListSink, interval: int = 2) -> list[MetricsHook | ValidationHook | ClosingHook]:
    metrics = MetricsHook(log_interval=interval, flops=FLOPS, file=MetricsFile(path), openers={"list": lambda start: sink})
    validation = ValidationHook(
        evaluate=lambda split, iters: {"lm_loss": 1.0}, interval=2, iters=1, valid=True, test=True, report=metrics.report
    )
    return [metrics, validation, ClosingHook(metrics)]


def test_rows_and_tracker_values(tmp_path: Path) -> None:
    path, sink = tmp_path / "run" / "metrics.jsonl", ListSink()
    drive(hooks(path, sink), [result(2.0), result(float("inf"), loss_scale=2.0), result(3.0)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    train = [row for row in rows if "lm_loss" in row]
    assert [row["iteration"] for row in train] == [1, 2, 3] and [row["lm_loss"] for row in train] == [2.0, None, 3.0]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "mfu", "samples", "tokens", "time"} <= set(train[0])
    assert (train[0]["tokens_per_second"], train[0]["mfu"], train[2]["samples"], train[2]["tokens"]) == (64.0, 30.0, 12, 96)
    assert train[1]["loss_scale"] == 2.0 and train[1]["skipped"] is False
    assert [(row["iteration"], row["valid_lm_loss"]) for row in rows if "valid_lm_loss" in row] == [(0, 1.0), (2, 1.0), (3, 1.0)]
    assert [row["iteration"] for row in rows if "test_lm_loss" in row] == [3]

    names = {step: set(values) for step, values in sink.rows if "train/lm_loss" in values}
    assert names[1] == {"train/learning_rate", "train/lm_loss", "train/grad_norm"}
    assert names[2] - names[1] == {
        "train/loss_scale",
        "runtime/samples_per_sec",
        "runtime/iteration_time",
        "runtime/steps_per_sec",
        "runtime/tokens_per_sec",
        "runtime/flops_per_sec_per_gpu",
        "runtime/model_flops_utilization",
        "runtime/hardware_flops_utilization",
    }
    assert (0, {"validation/lm_loss": 1.0, "validation/lm_loss_ppl": pytest.approx(2.718281828)}) in sink.rows
    assert sink.rows[-1][0] == 3 and "test/lm_loss" in sink.rows[-1][1] and sink.closed is False
    assert "train/reward_acc" in step_values(result(metrics={"reward acc": 1.0}))


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError):
        crash(path, ListSink())
    whole = path.read_text()
    path.write_text(whole + '{"iteration": 6, "lm_lo')  # torn by the crash
    metrics = MetricsHook(log_interval=1, flops=FLOPS, file=MetricsFile(path))
    drive([metrics, ClosingHook(metrics)], [result(7.0)] * 2, start=3)  # the last checkpoint was that of iteration 3
    assert path.read_text().startswith(whole) and all(json.loads(line) for line in path.read_text().splitlines())
    rows = [json.loads(line) for line in path.read_text().removeprefix(whole).splitlines()]
    assert [(row["iteration"], row["lm_loss"]) for row in rows] == [(4, 7.0), (5, 7.0)]
    # A last line that only lacks its newline is kept.
    path.write_text('{"iteration": 1, "lm_loss": 1.0}')
    MetricsFile(path).close()
    assert path.read_text().endswith("}\n")


def crash(path: Path, sink: ListSink) -> None:
    def stop(split: str, iters: int) -> dict[str, float]:
        raise RuntimeError

    metrics = MetricsHook(log_interval=1, flops=FLOPS, file=MetricsFile(path), openers={"list": lambda start: sink})
    late = ValidationHook(evaluate=stop, interval=5, iters=1, valid=True, test=False, at_start=False)
    try:
        drive([metrics, late], [result()] * 9)
    finally:
        assert sink.closed is True


def test_a_failing_tracker_is_dropped_and_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    setup_logging(rank=0, stream=out)
    monkeypatch.setenv("WANDB_API_KEY", "canary-123")

    class Broken(ListSink):
        def write(self, values: Mapping[str, float], step: int) -> None:
            raise OSError("server says no to canary-123")

    sink = Guarded("W&B", Broken())
    sink.write({"a": 1.0}, 1)
    sink.write({"a": 1.0}, 2)
    sink.close()
    (line,) = out.getvalue().splitlines()
    assert "W&B failed" in line and "canary" not in line and "***" in line
    assert wandb_key_found("https://api.wandb.ai")
    with pytest.raises(BackendError, match="not installed"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        require("comet_ml", where="use_comet")


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as events

    sink = TensorBoardSink(tmp_path, config={"hidden_size": 64}, start=0)
    for step in (1, 2):
        sink.write({"train/lm_loss": 3.0 / step}, step)
    sink.close()
    read = events.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/lm_loss")] == [(1, 3.0), (2, 1.5)]
    assert any(tag.startswith("hidden_size") for tag in read.Tags()["tensors"])


def test_wandb_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run = {"id": "abc123", "project": "neox", "group": "g", "name": "n"}
    sink = WandbSink(run, config={"hidden_size": 64}, directory=tmp_path)
    sink.write({"train/lm_loss": 2.5}, 1)
    sink.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")
    content = file.read_bytes()
    assert all(word in content for word in (b"abc123", b"neox", b"hidden_size", b"train/lm_loss", b"2.5"))


def test_comet_offline_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml", reason="comet_ml is not installed")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    for resumed, name in ((False, "first"), (True, "second")):
        folder = tmp_path / name
        key = "0123456789abcdef0123456789abcdef0123"
        experiment = {"previous_experiment": key} if resumed else {"experiment_key": key, "project_name": "p", "workspace": "w"}
        sink = CometSink(experiment, config={"a": 1}, name="n", tags=("t",), directory=folder)
        sink.write({"train/lm_loss": 2.5}, 1)
        sink.close()
        (archive,) = folder.glob("*.zip")
        with zipfile.ZipFile(archive) as opened:
            text = opened.read("messages.json").decode()
        assert key in archive.name or key in text or resumed
        assert "train/lm_loss" in text and "2.5" in text
