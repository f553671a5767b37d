# SPDX-License-Identifier: Apache-2.0
"""What a tool that reads a checkpoint in one process sets, whatever layout wrote it. Imports nothing."""

from __future__ import annotations

from typing import Any

# What training wanted and reading does not. FORMAT: as the reference sets them for generation.
READING: dict[str, Any] = {"checkpoint_activations": False, "partition_activations": False, "no_load_optim": True}

ALONE: dict[str, Any] = {
    **READING,
    "global_num_gpus": 1,
    "pipe_parallel_size": 0,
    "model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
}
