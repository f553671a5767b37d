# SPDX-License-Identifier: Apache-2.0
"""The checkpoint folder: which step is meant, both forms of the weights, strict names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "train"


def test_which_step_is_meant(tmp_path: Path) -> None:
    """`latest` or `iteration`; everything else is an error that lists what is there."""
    from megatron.checkpoint.steps.step_dirs import find_tag, saved_steps, write_latest

    for step in (5, 10, 100):
        (tmp_path / f"global_step{step}").mkdir()
    (tmp_path / "global_step7.partial").mkdir()
    assert saved_steps(tmp_path) == [5, 10, 100]
    with pytest.raises(CheckpointError, match="5, 10, 100"):
        find_tag(tmp_path)
    write_latest(tmp_path, "global_step10")
    assert (tmp_path / "latest").read_text() == "global_step10"
    assert find_tag(tmp_path) == "global_step10"
    assert find_tag(tmp_path, 5) == "global_step5"
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 6"):
        find_tag(tmp_path, 6)
    write_latest(tmp_path, "global_step11")
    with pytest.raises(CheckpointError, match="global_step11, which is not there"):
        find_tag(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        find_tag(tmp_path / "nowhere")


def test_both_forms_give_the_same_names() -> None:
    """Recorded checkpoints with and without a pipeline have the same canonical names and shapes."""
    from megatron.checkpoint.formats.neox_files import read_weights

    plain = read_weights(GOLDEN / "neox_pp0" / "ckpt" / "global_step0")
    layers = read_weights(GOLDEN / "neox_pp1" / "ckpt" / "global_step0")
    assert {n: t.shape for n, t in plain.items()} == {n: t.shape for n, t in layers.items()}
    assert "2.attention.query_key_value.weight" in plain


def test_differences_are_all_named() -> None:
    """A checkpoint that does not fit is refused with every name, and the module keeps its weights."""
    import torch
    from torch import nn

    from megatron.checkpoint.formats.neox_files import copy_weights, read_weights
    from megatron.checkpoint.steps.step_dirs import find_tag

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Module()
            layer.word_embeddings = nn.Embedding(8, 4)
            layer.unheard_of = nn.Linear(2, 2)
            self.sequential = nn.ModuleDict({"0": layer})

    module = Wrong()
    before = module.sequential["0"].word_embeddings.weight.clone()
    folder = GOLDEN / "neox_pp0" / "ckpt" / find_tag(GOLDEN / "neox_pp0" / "ckpt")
    with pytest.raises(CheckpointError) as caught:
        copy_weights(read_weights(folder), module, folder)
    text = str(caught.value)
    assert "0.unheard_of.weight" in text
    assert "2.attention.dense.bias" in text
    assert "model (8, 4), checkpoint (512, 64)" in text
    assert torch.equal(module.sequential["0"].word_embeddings.weight, before)


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    """No weights, no model."""
    from megatron.checkpoint.formats.neox_files import read_weights

    with pytest.raises(CheckpointError, match="missing"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="folder is missing"):
        read_weights(tmp_path / "nowhere")
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="ZeRO-3"):
        read_weights(tmp_path)
