# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is spread is told from its files' names, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.engine.checkpoint_layout import CheckpointLayout, stored_layout

PLAIN = ["mp_rank_00_model_states.pt"]
ZERO = [*PLAIN, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]
ZERO_3 = [name.replace("optim", "model") for name in ZERO[1:]] + ZERO[1:]
TWO_STAGES = ["mp_rank_01_model_states.pt", *PLAIN, "layer_00-model_00-model_states.pt"]
ZERO_3_TENSOR = [name.replace("mp_rank_00", "mp_rank_01") for name in ZERO_3] + ZERO_3
PIPE = [*PLAIN, "layer_00-model_00-model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"]


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (PLAIN, CheckpointLayout()),
        (ZERO, CheckpointLayout(partitions=2)),
        (ZERO_3, CheckpointLayout(partitions=2, sharded=True)),
        (PIPE, CheckpointLayout(pipelined=True, partitions=1)),
        (TWO_STAGES, CheckpointLayout(pipelined=True, model_ranks=2)),
        (ZERO_3_TENSOR, CheckpointLayout(partitions=2, model_ranks=2, tensor_ranks=2, sharded=True)),
    ],
)
def test_layouts_are_told_from_file_names(tmp_path: Path, names: list[str], layout: CheckpointLayout) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert stored_layout(tmp_path) == layout
