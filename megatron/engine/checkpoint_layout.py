# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint's weights and optimizer are sharded over files, told from their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.formats.neox_files import LAYER, MODEL, PARTITION, matched


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """What decides which files an engine writes, and which it can resume from as they are.

    pipelined:   the pipeline engine's form, one file per layer
    partitions:  ranks with the same weights over which ZeRO or bf16 sharded the optimizer; 0 = it is in one piece
    model_ranks: pipeline stages * tensor ranks, each with an optimizer of its own
    tensor_ranks: tensor ranks alone
    sharded:      no file holds whole weights (ZeRO 3)
    """

    pipelined: bool = False
    partitions: int = 0
    model_ranks: int = 1
    tensor_ranks: int = 1
    sharded: bool = False

    def __str__(self) -> str:
        stages = self.model_ranks // self.tensor_ranks
        parts = [f"pipeline of {stages} stage{'s' if stages > 1 else ''}" if self.pipelined else "no pipeline"]
        if self.tensor_ranks > 1:
            parts.append(f"{self.tensor_ranks} tensor ranks")
        shards = f"{self.partitions} part{'s' if self.partitions > 1 else ''}"
        parts.append(f"optimizer in {shards}" if self.partitions else "optimizer in one piece")
        return ", ".join(parts) + (", weights too (ZeRO-3)" if self.sharded else "")


def stored_layout(folder: Path) -> CheckpointLayout:
    """The layout of the files in a step's folder."""
    # FORMAT: optimizer partitions have files of their own; a whole optimizer is beside the weights.
    ranks = {match["data"] for _, match in matched(folder, PARTITION)}
    written = [match for _, match in matched(folder, MODEL)]
    models = len({match["model"] for match in written}) or 1
    layers = {match["tensor"] for _, match in matched(folder, LAYER)}
    return CheckpointLayout(
        pipelined=bool(layers),
        partitions=len(ranks),
        model_ranks=models,
        tensor_ranks=len(layers) or models,
        sharded=any(match["data"] for match in written),
    )
