# SPDX-License-Identifier: Apache-2.0
"""The inspector reads every file of a checkpoint, computes what numpy computes, and sees every difference."""

from __future__ import annotations

import json
import runpy
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.errors import CheckpointError
from support.forkserver import run
from support.tree import ROOT

GOLDEN = ROOT / "tests" / "golden" / "train"
TOOL = ROOT / "tools" / "ckpts" / "inspect_checkpoints.py"


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    return run([TOOL, *words], cwd=Path.cwd(), timeout=100)


def files_of_a_run(folder: Path, **weights: Any) -> Path:
    """A folder with a file of every kind that DeepSpeed writes, with the objects of its own that it puts into them."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    folder.mkdir(parents=True)
    parts = {"weight": torch.arange(12.0).reshape(3, 4), "half": torch.ones(5, dtype=torch.bfloat16), **weights}
    torch.save(OrderedDict(parts), folder / "layer_02-model_00-model_states.pt")
    client = {"module": None, "iteration": 4, "args": {"num_layers": 2}, "np_rng_state": np.random.RandomState(1).get_state()}
    torch.save(client, folder / "mp_rank_00_model_states.pt")
    moments = [{"step": torch.tensor(4.0), "exp_avg": torch.full((6,), 0.5)}]
    for stage, name in ((1, "bf16_zero_pp_rank_0_mp_rank_00"), (2, "zero_pp_rank_1_mp_rank_00")):
        slices = [OrderedDict(weight=fragment_address(numel=6, start=0))]
        state = {
            "base_optimizer_state": {"state": moments},
            "loss_scaler": DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 1, False),
            "zero_stage": ZeroStageEnum(stage),
            "single_partition_of_fp32_groups": [torch.arange(6.0)],
            "param_slice_mappings": slices,
        }
        torch.save({"optimizer_state_dict": state, "ds_version": "0.16.5"}, folder / f"{name}_optim_states.pt")
    return folder


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    """Tensors and plain values by name, those of DeepSpeed's own objects too; and the layout."""
    from megatron.checkpoint.conversion.inspect import TensorSelection, entries, kind, layout, locate

    files = locate(files_of_a_run(tmp_path / "global_step4"))
    found = {f"{file}/{name}": kind(value) for file, name, value in entries(files, TensorSelection())}
    shard = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt/optimizer_state_dict"
    assert found["layer_02-model_00-model_states.pt/weight"] == "float32 [3, 4]"
    assert found["layer_02-model_00-model_states.pt/half"] == "bfloat16 [5]"
    assert found["mp_rank_00_model_states.pt/iteration"] == "4"
    assert found["mp_rank_00_model_states.pt/np_rng_state/1"] == "uint32 [624]"
    assert found[f"{shard}/base_optimizer_state/state/0/exp_avg"] == "float32 [6]"
    assert found[f"{shard}/loss_scaler/cur_scale"] == "65536.0"
    assert found[f"{shard}/param_slice_mappings/0/weight/numel"] == "6"
    assert found[f"{shard.replace('bf16_zero_pp_rank_0', 'zero_pp_rank_1')}/single_partition_of_fp32_groups/0"] == "float32 [6]"
    assert layout(files) == "weights by layer, tensor ranks: 1; optimizer shards, data ranks: 2"
    moments = [name for _, name, _ in entries(files, TensorSelection(pattern="exp_avg", tensors=True))]
    assert moments == ["optimizer_state_dict/base_optimizer_state/state/0/exp_avg"] * 2


@pytest.mark.parametrize("block", [7, 2**22])
def test_statistics_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Whatever the block; what is not finite is counted and left out."""
    import torch

    from megatron.checkpoint.conversion import inspect

    monkeypatch.setattr(inspect, "BLOCK", block)
    values = 1000 + torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    values[0, :3] = torch.tensor([0.0, float("nan"), float("inf")])
    found, finite = inspect.statistics(values), values[torch.isfinite(values)].double().numpy()
    expected = (finite.min(), finite.max(), finite.mean(), finite.std(), np.linalg.norm(finite), 1 / 55, 2 / 55)
    assert (found.min, found.max, found.mean, found.std, found.norm, found.zeros, found.not_finite) == pytest.approx(expected, rel=1e-12)
    half = inspect.statistics(torch.tensor([1.0, -3.0], dtype=torch.bfloat16))
    assert (half.min, half.max, half.mean, half.std) == (-3, 1, -1, 2)
    assert inspect.statistics(torch.zeros(0)).zeros == 0


def test_differences_are_found_by_name(tmp_path: Path) -> None:
    """A number, a shape, a dtype, a name, a plain value; NaN equals NaN, and -0 equals 0."""
    import torch

    from megatron.checkpoint.conversion.inspect import TensorSelection, differences, locate

    nan = torch.tensor([float("nan"), 0.0])
    first = files_of_a_run(tmp_path / "a", same=nan, number=torch.zeros(3), shape=torch.zeros(2), kind=torch.ones(2), gone=torch.ones(1))
    changed = torch.tensor([0.0, 0.25, -0.5])
    second = files_of_a_run(tmp_path / "b", same=-nan, number=changed, shape=torch.zeros(2, 1), kind=torch.ones(2).half(), new=nan)
    assert not list(differences(locate(first), locate(first), TensorSelection()))
    found = {one.name.split("/")[1]: (one.kind, one.max_abs) for one in differences(locate(first), locate(second), TensorSelection())}
    assert found == {
        "number": ("value", 0.5),
        "shape": ("shape", None),
        "kind": ("dtype", 0.0),
        "gone": ("only in the first", None),
        "new": ("only in the second", None),
    }
    assert not list(differences(locate(first), locate(second), TensorSelection(pattern="same|weight")))


def test_the_tool_finds_steps_and_says_when_two_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways to name a folder; exit status 0 for equal checkpoints and 1 for others."""
    import torch
    from safetensors.torch import save_file

    save = tmp_path / "run"
    files_of_a_run(save / "global_step4")
    files_of_a_run(save / "global_step8", weight=torch.arange(12.0).reshape(3, 4) + 2)
    (save / "latest").write_text("global_step8")
    listed = tool("--checkpoint-path", save, "--stats", "--filter", "layer_02.*weight")
    assert listed.returncode == 0 and "weight  float32 [3, 4]  min 2  max 13" in listed.stdout, listed.stdout + listed.stderr
    differ = tool(save / "global_step4", "--diff", save, "--json")
    assert differ.returncode == 1, differ.stdout + differ.stderr
    (row,) = json.loads(differ.stdout)["differences"]
    assert row["name"] == "layer_02-model_00-model_states.pt/weight" and row["max_abs"] == 2
    called = runpy.run_path(str(TOOL))["main"]
    assert called([f"{save},{save}", "--iteration", "4", "-d"]) == 0 and "no differences" in capsys.readouterr().out
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": torch.ones(2), "v": torch.zeros(3)}, model / "model.safetensors")
    called([str(model), "--json", "--stats"])
    rows = json.loads(capsys.readouterr().out)["entries"]
    assert {row["name"]: (row["dtype"], row["shape"], row["max"], row["zeros"]) for row in rows} == {
        "w": ("float32", [2], 1, 0),
        "v": ("float32", [3], 0, 1),
    }
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 5; steps there: 4, 8"):
        called([str(save), "--iteration", "5"])


@pytest.mark.parametrize("run", sorted(path.parent.name for path in GOLDEN.glob("*/ckpt")))
def test_checkpoints_of_gpt_neox_are_read(run: str) -> None:
    """Every file of every recorded checkpoint."""
    from megatron.checkpoint.conversion.inspect import TensorSelection, entries, locate

    found = list(entries(locate(GOLDEN / run / "ckpt", 0), TensorSelection()))
    assert sum(name.endswith("word_embeddings.weight") for _, name, _ in found) >= 1
    assert any(name == "iteration" and value == 0 for _, name, value in found)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Nothing there, an empty folder, a torch.distributed checkpoint."""
    from megatron.checkpoint.conversion.inspect import locate

    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"\x80\x04.")
    (tmp_path / "empty").mkdir()
    for name, told in (("absent", "no such file"), ("empty", "no checkpoint file"), ("dcp", "pickle")):
        with pytest.raises(CheckpointError, match=told) as caught:
            locate(tmp_path / name)
        assert name in str(caught.value.where)
