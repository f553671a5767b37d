# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose ranks no longer hold the same weights where they should. How that is seen, engine/replica_consistency.py says."""

from __future__ import annotations

import time

from megatron.engine.base import Engine, StepResult
from megatron.engine.replica_consistency import drifted
from megatron.errors import TrainingError
from megatron.hooks.base import BaseHook, TrainState, Verdict
from megatron.log import get_logger

log = get_logger(__name__)

_MOST = 8


class ReplicaHook(BaseHook):
    """Looks every `interval` steps, right after the update. Must stand before what saves."""

    def __init__(self, *, interval: int) -> None:
        self.interval = interval
        self._equal: int | None = None

    def on_start(self, state: TrainState, engine: Engine) -> None:
        """A run that begins with different weights must not go on with them."""
        groups = engine.groups
        if groups.replicas.size == groups.tp.size == 1:
            log.info("replica_check_interval: no weight of this run is held twice, so there is nothing to compare")
        self._look(state, engine)

    def after_step(self, state: TrainState, result: StepResult, engine: Engine) -> Verdict:
        """Raise TrainingError, on every rank, where weights differ."""
        if state.iteration % self.interval == 0:
            self._look(state, engine)
        return Verdict.CONTINUE

    def _look(self, state: TrainState, engine: Engine) -> None:
        since = time.perf_counter()
        lines = drifted(engine.module(), engine.groups, engine.device)
        if not lines:
            log.debug("weights are equal on all replicas at iteration %d (%.1f ms)", state.iteration, 1e3 * (time.perf_counter() - since))
            self._equal = state.iteration
            return
        shown = lines[:_MOST] + ([f"and {len(lines) - _MOST} weights more"] if len(lines) > _MOST else [])
        known = self._equal is not None and self._equal < state.iteration  # a run may have gone back since
        before = f" They were equal at iteration {self._equal}: go on from a checkpoint up to there." if known else ""
        raise TrainingError(
            "ranks that should hold the same weights do not:\n" + "\n".join(f"    {line}" for line in shown),
            where=f"iteration {state.iteration}, replica_check_interval {self.interval}",
            fix=f"look for a faulty device, memory or network on the hosts of these ranks.{before}",
        )
