# SPDX-License-Identifier: Apache-2.0
"""Safetensors directories: shards, their index, and damage."""

import json
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.formats.hf_files import read_config, read_state
from megatron.errors import CheckpointError
from support.foreign import write_model


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(12.0)
    # "b" shares memory with "a"
    return {"a": base.view(3, 4), "b": base[:4], "c": torch.ones(2, dtype=torch.bfloat16)}


def test_round_trip_in_one_file_and_in_shards(tmp_path: Path):
    for limit, files in ((10**6, 1), (50, 2), (1, 3)):
        write_model(tmp_path, tensors(), {"model_type": "llama"}, limit=limit)
        state = read_state(tmp_path)
        assert set(state) == {"a", "b", "c"}
        assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in tensors().items())
        assert read_config(tmp_path) == {"model_type": "llama"}
        shapes = read_state(tmp_path, empty=True)
        assert all(shapes[name].is_meta and shapes[name].shape == tensor.shape for name, tensor in tensors().items())
        if files > 1:
            table = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert len(set(table["weight_map"].values())) == files
            assert table["metadata"]["total_size"] == 68
    assert not list(tmp_path.glob("*.tmp.*"))


def test_damage_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        read_state(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        read_state(tmp_path)


def test_older_files_are_read_where_there_are_no_safetensors(tmp_path: Path):
    first, second = {"a": torch.arange(6.0).view(2, 3)}, {"b": torch.ones(4, dtype=torch.bfloat16)}
    torch.save(first, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
    table = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    state, shapes = read_state(tmp_path), read_state(tmp_path, empty=True)
    for name, tensor in {**first, **second}.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
        assert shapes[name].is_meta and shapes[name].shape == tensor.shape
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002.bin is missing"):
        read_state(tmp_path)
    write_model(tmp_path, tensors(), {"model_type": "llama"})
    assert set(read_state(tmp_path)) == {"a", "b", "c"}, "safetensors come first"


def test_older_files_run_no_code_and_hold_tensors(tmp_path: Path):
    torch.save({"a": [1, 2]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a table of tensors"):
        read_state(tmp_path)
    torch.save({"a": tmp_path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="objects that are not plain data"):
        read_state(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)
