# SPDX-License-Identifier: Apache-2.0
"""Takes a running engine back to one of the run's own checkpoints, in the same processes. Knows no configuration object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.steps.discovery import Search, find, set_aside_after
from megatron.checkpoint.steps.step_dirs import saved_steps
from megatron.checkpoint.steps.verify import Verify
from megatron.engine.base import Engine
from megatron.engine.restore import TrainPosition, resume_everything
from megatron.errors import DivergenceError
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import on_first_rank


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Goes back. Call on every rank.

    directory:  `save`
    compared:   what a load compares
    batch_size: samples per step
    rng:        also take the random states
    verify:     how closely a checkpoint is looked at
    """

    engine: Engine
    spec: ModelSpec
    directory: Path
    compared: Mapping[str, Any]
    batch_size: int
    rng: bool = True
    verify: Verify = Verify.FULL

    def to(self, before: int) -> TrainPosition:
        """Take up the newest whole checkpoint of step `before` or an earlier one; later ones are set aside.

        Raises DivergenceError where there is none, CheckpointError where all are damaged.
        """
        world = self.engine.groups.world
        if not on_first_rank(partial(self._clear_way, before), world):
            raise DivergenceError(
                f"there is no checkpoint of step {before} or before to go back to",
                where=str(self.directory),
                fix="save more often (checkpoint_factor), and before the first step: extra_save_iters: [0]",
            )
        tag = find(Search(directory=self.directory, own=True, verify=self.verify), world)
        folder = self.directory / tag
        return resume_everything(self.engine, folder, self.spec, compared=self.compared, batch_size=self.batch_size, rng=self.rng)

    def _clear_way(self, before: int) -> bool:
        steps = [step for step in saved_steps(self.directory) if step <= before]
        if steps:
            set_aside_after(self.directory, max(steps))
        return bool(steps)
