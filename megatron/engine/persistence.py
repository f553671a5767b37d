# SPDX-License-Identifier: Apache-2.0
"""Saves a run's whole state as a checkpoint folder and takes it up again. Knows no configuration object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.neox_store import bookkeeping, step_tag, write_latest
from megatron.checkpoint.resume import capture_rng, compare_args, restore_rng, write_configs
from megatron.checkpoint.retention import prune
from megatron.engine.base import Engine
from megatron.engine.distributed import seed_everything
from megatron.engine.forward_check import STORED
from megatron.errors import CheckpointError
from megatron.log import get_logger
from megatron.mpu.collectives import barrier, of_all_ranks
from megatron.mpu.groups import Group

log = get_logger(__name__)

OURS = "run_state"
"""Key of what this project keeps beside the reference's client state."""

RNG = "rng_of_data_ranks"
"""Under OURS: the random states of every data-parallel rank, where there are several. The reference keeps those of the first alone."""


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
    optimizer: whether the engine writes the optimizer's state
    forward:   gives the logits of a fixed input, to be kept; called on all ranks
    keep_last: how many of the newest checkpoints stay; None = all
    keep_every: multiples of this many steps stay in any case
    protected: steps that stay in any case
    published: is told each folder that has its name, on the first rank, before older ones are deleted
    """

    engine: Engine
    directory: Path
    compared: Mapping[str, Any]
    configs: Mapping[str, str]
    rng: bool = True
    kept: Callable[[], Mapping[str, Any]] = dict
    optimizer: bool = True
    forward: Callable[[], Tensor] | None = None
    keep_last: int | None = None
    keep_every: int | None = None
    protected: frozenset[int] = frozenset()
    published: Callable[[Path], None] | None = None

    def save(self, iteration: int, samples: int, tokens: int) -> Path:
        """Write `global_step<iteration>`, then move `latest`; returns the folder. All ranks call it."""
        world = self.engine.groups.world
        client_state: dict[str, Any] = {"iteration": iteration, "args": dict(self.compared)}
        client_state[OURS] = {"samples": samples, "tokens": tokens, "kept": dict(self.kept()), "optimizer": self.optimizer}
        if self.forward is not None:
            client_state[STORED] = self.forward()
        if self.rng:
            # Only the first data rank writes its client state.
            states = of_all_ranks(capture_rng(), self.engine.groups.replicas)
            client_state.update(states[0])
            client_state[OURS].update({RNG: states} if len(states) > 1 else {})
        tag = step_tag(iteration)
        if world.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        barrier(world)
        self.engine.save(self.directory, tag, client_state)
        if world.rank == 0:
            write_configs(self.directory / tag, self.configs)
            write_latest(self.directory, tag)
            log.info("  successfully saved checkpoint at iteration %7d to %s", iteration, self.directory / tag)
            if self.published is not None:
                self.published(self.directory / tag)
            if self.keep_last is not None:
                # The step just written stays even where an abandoned attempt left later ones.
                prune(self.directory, keep=self.keep_last, protected=self.protected | {iteration}, every=self.keep_every)
        barrier(world)
        return self.directory / tag


def resume_everything(engine: Engine, directory: Path, tag: str, *, compared: Mapping[str, Any], batch_size: int, rng: bool) -> Position:
    """Load weights, optimizer, schedule, position and (rng) random states. All ranks call it."""
    folder = directory / tag
    stored = bookkeeping(folder, deepspeed_types=True)
    compare_args(compared, stored.get("args"), folder)
    if (stored.get(OURS) or {}).get("optimizer") is False:
        raise CheckpointError(
            "the checkpoint was written without the optimizer's state (no_save_optim)",
            where=str(folder),
            mend="set `no_load_optim: true` to go on with a fresh optimizer, or `finetune: true` to start anew from the weights",
        )
    client_state = engine.load(directory, tag)
    if rng:
        take_up_rng(client_state, engine.groups.replicas, folder)
    return _position(client_state, folder, batch_size)


def resume_position(engine: Engine, folder: Path, *, compared: Mapping[str, Any], batch_size: int, rng: bool) -> Position:
    """Take up position, schedule and (rng) random states; the weights are in the engine already, the optimizer starts anew."""
    client_state = bookkeeping(folder, deepspeed_types=True)
    compare_args(compared, client_state.get("args"), folder, weights_only=True)
    if rng:
        take_up_rng(client_state, engine.groups.replicas, folder)
    position = _position(client_state, folder, batch_size)
    engine.set_schedule_step(position.iteration)
    return position


def take_up_rng(client_state: Mapping[str, Any], dp: Group, folder: Path) -> None:
    """Set this rank's random states to what they were.

    Where the checkpoint knows the states of one rank only, or of another number of ranks, the others start streams of their own
    from it: two ranks with one state would drop the same activations.
    """
    states = (client_state.get(OURS) or {}).get(RNG) or []
    if len(states) == dp.size:
        restore_rng(states[dp.rank], folder)
        return
    restore_rng(client_state, folder)
    if dp.rank > 0:
        seed_everything(int(torch.randint(2**62, ())) + dp.rank)


def _position(client_state: Mapping[str, Any], folder: Path, batch_size: int) -> Position:
    iteration = int(client_state.get("iteration", client_state.get("total_iters", client_state.get("global_steps", 0))))
    ours = client_state.get(OURS) or {}
    log.info("Loading checkpoint and starting from iteration %d", iteration)
    samples = int(ours.get("samples", iteration * batch_size))
    if samples != iteration * batch_size:
        log.warning(
            "%d iterations took %d samples so far, %g each, and take %d each now: the data goes on behind the last sample",
            *(iteration, samples, samples / iteration, batch_size),
        )
    return Position(iteration=iteration, samples=samples, tokens=int(ours.get("tokens", 0)), kept=dict(ours.get("kept", {})))
