# SPDX-License-Identifier: Apache-2.0
"""What a user set and does nothing is named, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.neox_arguments import NeoXArgs
from support.tiny import tiny

ON = {"checkpoint_activations": True}


@pytest.mark.parametrize(
    ("keys", "idle"),
    [
        ({"deepscale": True, "short_seq_prob": 0.1, "seed": 5}, {"deepscale"}),
        ({**ON, "checkpoint_num_layers": 2, "checkpoint_in_cpu": True}, set()),
        ({"checkpoint_num_layers": 2, "checkpoint_granularity": "Selective"}, {"checkpoint_num_layers", "checkpoint_granularity"}),
        ({"checkpoint_num_layers": 1, "partition_activations": False, "checkpoint_granularity": "FULL"}, set()),
        ({**ON, "contiguous_checkpointing": True, "synchronize_each_layer": True}, {"contiguous_checkpointing", "synchronize_each_layer"}),
        ({**ON, "profile_backward": True, "deepspeed_activation_checkpointing": False},
         {"profile_backward", "deepspeed_activation_checkpointing"}),
        ({**ON, "activation_checkpointing": {"cpu_checkpointing": True, "profile": True, "number_checkpoints": 4}},
         {"activation_checkpointing.profile", "activation_checkpointing.number_checkpoints"}),
        ({"activation_checkpointing": {"cpu_checkpointing": True, "partition_activations": False}},
         {"activation_checkpointing.cpu_checkpointing"}),
        ({**ON, "partition_activations": True, "activation_checkpointing": {}}, {"partition_activations"}),
        ({"sequence_parallel": True}, {"sequence_parallel"}),
        ({"sequence_parallel": True, "model_parallel_size": 2, "global_num_gpus": 2}, set()),
        ({"sequence_parallel": False}, set()),
    ],
)  # fmt: skip
def test_idle_keys(keys: dict[str, Any], idle: set[str]) -> None:
    assert set(NeoXArgs.from_dict(tiny(**keys)).ignored_keys()) == idle


def test_the_block_replaces_the_single_keys() -> None:
    block = {"cpu_checkpointing": True, "contiguous_memory_optimization": True}
    args = NeoXArgs.from_dict(tiny(**ON, partition_activations=True, activation_checkpointing=block))
    assert args.run.checkpoint_in_cpu and not args.run.partition_activations
    assert str(args.origin("checkpoint_in_cpu")) == "derived from activation_checkpointing"
    kept = NeoXArgs.from_dict(tiny(**ON, partition_activations=True))
    assert kept.run.partition_activations and not kept.run.checkpoint_in_cpu
