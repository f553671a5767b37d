# SPDX-License-Identifier: Apache-2.0
"""Restores a run's whole state from a checkpoint folder (checkpointer.py wrote it), also of a run that rolls back to one of its own.

With it, a check of the logits of a fixed input: kept in a checkpoint when it is written, compared when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.formats.neox_files import bookkeeping
from megatron.checkpoint.loading.resume_state import compare_args, restore_rng
from megatron.checkpoint.steps.discovery import Search, find, set_aside_after
from megatron.checkpoint.steps.manifest import Verify
from megatron.checkpoint.steps.step_dirs import saved_steps
from megatron.data.batch import Batch
from megatron.engine.base import Engine
from megatron.engine.distributed import seed_everything
from megatron.engine.reshard import stored_stages, stored_state
from megatron.errors import CheckpointError, DivergenceError
from megatron.log import get_logger
from megatron.model.spec import ModelSpec
from megatron.mpu.collectives import on_first_rank
from megatron.mpu.groups import Group, Groups

log = get_logger(__name__)

OURS = "run_state"
"""Key of what this project keeps beside the reference's client state."""

RNG = "rng_of_data_ranks"
"""Under OURS: the random states of every data-parallel rank, where there are several. The reference keeps those of the first alone."""


@dataclass(frozen=True, kw_only=True)
class TrainPosition:
    """How far a run is: optimizer steps, and samples and tokens consumed over all data ranks."""

    iteration: int = 0
    samples: int = 0
    tokens: int = 0
    kept: Mapping[str, Any] = field(default_factory=dict)


def resume(
    engine: Engine, folder: Path, spec: ModelSpec | None, *, compared: Mapping[str, Any], batch_size: int, rng: bool
) -> TrainPosition:
    """Load weights, optimizer, schedule, position and (rng) random states, whatever layout wrote them. All ranks call it.

    spec: the model; None = its weights are in the engine already and the optimizer starts afresh, so all else is restored
    """
    stored = stored_state(folder, engine.groups) if spec is None else bookkeeping(folder, deepspeed_types=True)
    compare_args(compared, stored.get("args"), folder)
    if spec is not None:
        if (stored.get(OURS) or {}).get("optimizer") is False:
            raise CheckpointError(
                "the checkpoint was written without the optimizer's state (no_save_optim)",
                where=str(folder),
                fix="set `no_load_optim: true` to go on with a fresh optimizer, or `finetune: true` to start anew from the weights",
            )
        stored = engine.load(folder.parent, folder.name, spec)
    if rng:
        take_up_rng(stored, engine.groups, folder)
    position = _position(stored, folder, batch_size)
    if spec is None:
        engine.set_schedule_step(position.iteration, stored.get("lr_scheduler"))
    return position


def take_up_rng(client_state: Mapping[str, Any], groups: Groups, folder: Path) -> None:
    """Set this rank's random states to what they were.

    Where the checkpoint knows the states of one rank only, or of another number of ranks or stages, the others start streams of
    their own from it: two ranks with one state would drop the same activations.
    """
    dp = groups.replicas
    stage = groups.pp.rank if stored_stages(folder) != groups.pp.size else 0
    states = (client_state.get(OURS) or {}).get(RNG) or []
    known = len(states) == dp.size
    restore_rng(states[dp.rank] if known else client_state, folder)
    if stage > 0 or (dp.rank > 0 and not known):
        seed_everything(int(torch.randint(2**62, ())) + stage * dp.size + dp.rank)


def _position(client_state: Mapping[str, Any], folder: Path, batch_size: int) -> TrainPosition:
    iteration = int(client_state.get("iteration", client_state.get("total_iters", client_state.get("global_steps", 0))))
    ours = client_state.get(OURS) or {}
    log.info("Loading checkpoint and starting from iteration %d", iteration)
    samples = int(ours.get("samples", iteration * batch_size))
    if samples != iteration * batch_size:
        log.warning(
            "%d iterations took %d samples so far, %g each, and take %d each now: the data goes on behind the last sample",
            *(iteration, samples, samples / iteration, batch_size),
        )
    return TrainPosition(iteration=iteration, samples=samples, tokens=int(ours.get("tokens", 0)), kept=dict(ours.get("kept", {})))


def rollback_folder(directory: Path, before: int, world: Group, verify: Verify) -> Path:
    """The newest whole checkpoint of step `before` or an earlier one; later ones are set aside. All ranks call it.

    verify: how closely a checkpoint is looked at
    Raises DivergenceError where there is none, CheckpointError where all are damaged.
    """

    def set_aside_later() -> bool:
        steps = [step for step in saved_steps(directory) if step <= before]
        if steps:
            set_aside_after(directory, max(steps))
        return bool(steps)

    if not on_first_rank(set_aside_later, world):
        raise DivergenceError(
            f"there is no checkpoint of step {before} or before to go back to",
            where=str(directory),
            fix="save more often (checkpoint_factor), and before the first step: extra_save_iters: [0]",
        )
    return directory / find(Search(directory=directory, own=True, verify=verify), world)


STORED = "checkpoint_validation_logits"
"""FORMAT: key of the logits in a checkpoint's client state."""

LENGTH = 16
"""Tokens of the fixed input: enough to meet every layer, few enough to keep all their logits."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Largest allowed difference, as a share of the largest logit, in float32 and where one side is in half precision: other kernels
and other layouts stay below."""


def forward_pass(engine: Engine, *, vocab_size: int, seq_length: int) -> Tensor:
    """Logits [1, min(16, seq_length), v] of the fixed input. All ranks call it."""
    length = min(LENGTH, seq_length)
    tokens = ((torch.arange(length) * 7919 + 13) % vocab_size).unsqueeze(0)
    nothing = torch.zeros(1, length)
    batch = Batch(tokens=tokens, labels=tokens, loss_weight=nothing, segment_ids=nothing.int())
    (logits,) = engine.score([batch], lambda logits, targets, context: context.gather_tokens(logits.full()))
    return logits


def compare_forward(stored: Mapping[str, Any], now: Tensor, folder: Path) -> None:
    """Raise CheckpointError when the logits stored in a checkpoint's bookkeeping are not those of the model that was read from it."""
    before = stored.get(STORED)
    if before is None:
        log.warning("%s holds no logits of a fixed input, so there is nothing to compare the model with", folder)
        return
    if before.shape != now.shape:
        raise CheckpointError(f"logits of the fixed input: {list(before.shape)} stored, {list(now.shape)} now", where=str(folder), fix=_FIX)
    exact = before.dtype == now.dtype == torch.float32
    difference = float((before.float() - now.float()).abs().max())
    largest = float(before.float().abs().max())
    # Written so that NaN is refused, too.
    if not difference <= (TOLERANCE if exact else HALF_TOLERANCE) * largest:
        raise CheckpointError(
            f"the model read from the checkpoint is not the one that was saved: its logits differ by up to {difference:.3g} "
            f"(largest logit {largest:.3g})",
            where=str(folder),
            fix=_FIX,
        )
    log.info("the forward pass of a fixed input gives the logits of the checkpoint (largest difference %.3g)", difference)


_FIX = "use the configuration the checkpoint was trained with; `checkpoint_validation_with_forward_pass: false` skips this check"
