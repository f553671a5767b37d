# SPDX-License-Identifier: Apache-2.0
"""Saves a run's whole state as a checkpoint folder and takes it up again. Knows no configuration object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.neox_store import bookkeeping, step_tag, write_latest
from megatron.checkpoint.resume import capture_rng, compare_args, restore_rng, write_configs
from megatron.engine.base import Engine
from megatron.log import get_logger
from megatron.mpu.collectives import barrier

log = get_logger(__name__)

OURS = "run_state"
"""Key of what this project keeps beside the reference's client state."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is: optimizer steps, and samples and tokens consumed over all data ranks."""

    iteration: int = 0
    samples: int = 0
    tokens: int = 0
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Saver:
    """Writes checkpoints of one run.

    directory: `save`
    compared:  what a later load compares (checkpoint format: "args")
    configs:   the YAML files of the run, by name
    rng:       also keep the random states
    kept:      gives what hooks want to find again after a resume (a W&B run id, ...)
    """

    engine: Engine
    directory: Path
    compared: Mapping[str, Any]
    configs: Mapping[str, str]
    rng: bool = True
    kept: Callable[[], Mapping[str, Any]] = dict

    def save(self, iteration: int, samples: int, tokens: int) -> Path:
        """Write `global_step<iteration>`, then move `latest`; returns the folder. All ranks call it."""
        world = self.engine.groups.world
        client_state: dict[str, Any] = {"iteration": iteration, "args": dict(self.compared)}
        client_state[OURS] = {"samples": samples, "tokens": tokens, "kept": dict(self.kept())}
        if self.rng:
            client_state.update(capture_rng())
        tag = step_tag(iteration)
        if world.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        barrier(world)
        self.engine.save(self.directory, tag, client_state)
        if world.rank == 0:
            write_configs(self.directory / tag, self.configs)
            write_latest(self.directory, tag)
            log.info("  successfully saved checkpoint at iteration %7d to %s", iteration, self.directory / tag)
        barrier(world)
        return self.directory / tag


def resume_everything(engine: Engine, directory: Path, tag: str, *, compared: Mapping[str, Any], batch_size: int, rng: bool) -> Position:
    """Load weights, optimizer, schedule, position and (rng) random states. All ranks call it."""
    folder = directory / tag
    compare_args(compared, bookkeeping(folder, deepspeed_types=True).get("args"), folder)
    client_state = engine.load(directory, tag)
    return _position(client_state, folder, batch_size, rng)


def resume_position(engine: Engine, folder: Path, *, compared: Mapping[str, Any], batch_size: int, rng: bool) -> Position:
    """Take up position, schedule and (rng) random states; the weights are in the engine already, the optimizer starts anew."""
    client_state = bookkeeping(folder, deepspeed_types=True)
    compare_args(compared, client_state.get("args"), folder)
    position = _position(client_state, folder, batch_size, rng)
    engine.set_schedule_step(position.iteration)
    return position


def _position(client_state: Mapping[str, Any], folder: Path, batch_size: int, rng: bool) -> Position:
    iteration = int(client_state.get("iteration", client_state.get("total_iters", client_state.get("global_steps", 0))))
    ours = client_state.get(OURS) or {}
    if rng:
        restore_rng(client_state, folder)
    log.info("Loading checkpoint and starting from iteration %d", iteration)
    samples = int(ours.get("samples", iteration * batch_size))
    return Position(iteration=iteration, samples=samples, tokens=int(ours.get("tokens", 0)), kept=dict(ours.get("kept", {})))
