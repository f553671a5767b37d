# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint's weights and optimizer are spread over files, told from their names. Knows no DeepSpeed object."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import CheckpointError

# FORMAT: optimizer partitions have files of their own; a whole optimizer is beside the weights.
_PARTITION = re.compile(r"^(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
_MODEL = re.compile(r"^(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt$")
_LAYER = re.compile(r"^layer_\d+-model_\d+-model_states\.pt$")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides which files an engine writes, and can resume from.

    pipelined:   the pipeline engine's form, one file per layer
    partitions:  ranks with the same weights over which ZeRO or bf16 spread the optimizer; 0 = it is in one piece
    model_ranks: pipeline stages * tensor ranks, each with an optimizer of its own
    """

    pipelined: bool = False
    partitions: int = 0
    model_ranks: int = 1

    def __str__(self) -> str:
        pipe = "pipe_parallel_size >= 1" if self.pipelined else "pipe_parallel_size 0"
        if self.model_ranks > 1:
            pipe += f", {self.model_ranks} stages and tensor ranks"
        pieces = f"{self.partitions} partition{'s' if self.partitions > 1 else ''}"
        return f"{pipe}, optimizer in {pieces} (ZeRO or bf16)" if self.partitions else f"{pipe}, optimizer in one piece (fp32, ZeRO 0)"


def stored_layout(folder: Path) -> Layout:
    """The layout of the files in a step's folder."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    ranks = {int(match.group(1)) for name in names if (match := _PARTITION.match(name))}
    model_ranks = {int(match.group(1)) for name in names if (match := _MODEL.match(name))}
    return Layout(pipelined=any(_LAYER.match(name) for name in names), partitions=len(ranks), model_ranks=max(1, len(model_ranks)))


def refuse_other_layout(folder: Path, ours: Layout) -> None:
    """Raise CheckpointError when the optimizer in `folder` is not spread as this run's is."""
    stored = stored_layout(folder)
    if stored != ours:
        raise CheckpointError(
            f"the checkpoint's optimizer was saved in another layout: {stored}; this run has: {ours}",
            where=str(folder),
            mend="resume with the layout it was written with, or take the weights alone: `no_load_optim: true` keeps the position, "
            "`finetune: true` starts anew",
        )
