# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> the trackers of a rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from megatron.errors import ConfigError
from megatron.hooks.trackers.sinks import (
    CometSink,
    CometSpec,
    Opener,
    TensorBoardSink,
    WandbSink,
    WandbSpec,
    require,
    wandb_key_found,
    wandb_offline,
)

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

KEPT = "tracker_ids"
"""Key under which checkpoints keep the ids."""


def tracker_ids(kept: Mapping[str, object]) -> dict[str, str]:
    """Ids of the run at its trackers: those kept in the checkpoint it resumed from, else new ones."""
    saved = kept.get(KEPT)
    known = {str(key): str(value) for key, value in saved.items()} if isinstance(saved, Mapping) else {}
    return {"wandb": uuid4().hex[:8], "comet": uuid4().hex, **known}


def build_openers(args: NeoXArgs, rank: int, ids: Mapping[str, str], *, resumed: bool) -> dict[str, Opener]:
    """The requested trackers of this rank; their packages are looked for now, they are opened at the start of training.

    ids:     the run's, by tracker
    resumed: whether they come from a checkpoint
    """
    logs, openers = args.logs, dict[str, Opener]()
    config = args.to_flat()
    if logs.tensorboard_dir and rank == 0:
        require("tensorboard", where="tensorboard_dir")
        directory = Path(logs.tensorboard_dir)
        openers["TensorBoard"] = lambda start: TensorBoardSink(directory, config=config, start=start)
    wandb = _wandb_spec(args, rank, ids)
    if wandb is not None:
        openers["Weights & Biases"] = lambda start: WandbSink(wandb, config=config)
    if logs.use_comet and rank == 0:
        require("comet_ml", where="use_comet")
        comet = _comet_spec(args, ids, resumed)
        openers["Comet"] = lambda start: CometSink(comet, config=config)
    return openers


def _wandb_spec(args: NeoXArgs, rank: int, ids: Mapping[str, str]) -> WandbSpec | None:
    """The W&B run of this rank; None when it has none. Unset `use_wandb` means: if a key is found."""
    logs = args.logs
    if logs.use_wandb is False or (rank != 0 and not logs.wandb_init_all_ranks):
        return None
    if logs.use_wandb is None and not wandb_key_found(logs.wandb_host):
        return None
    require("wandb", where="use_wandb")
    if not wandb_offline() and not wandb_key_found(logs.wandb_host):
        raise ConfigError(
            f"use_wandb is set, but no key for {logs.wandb_host} was found",
            where="use_wandb",
            fix="run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline",
        )
    suffix = f"-rank{rank}" if rank else ""
    place = logs.log_dir or args.checkpoint.save
    return WandbSpec(
        run_id=ids.get("wandb", uuid4().hex[:8]) + suffix,
        project=logs.wandb_project,
        group=logs.wandb_group,
        name=logs.wandb_run_name + suffix if logs.wandb_run_name else None,
        team=logs.wandb_team,
        host=logs.wandb_host,
        directory=Path(place) if place else None,
    )


def _comet_spec(args: NeoXArgs, ids: Mapping[str, str], resumed: bool) -> CometSpec:
    logs = args.logs
    place = logs.log_dir or args.checkpoint.save
    return CometSpec(
        key=ids.get("comet", uuid4().hex),
        resumed=resumed,
        workspace=logs.comet_workspace,
        project=logs.comet_project,
        name=logs.comet_experiment_name,
        tags=tuple(logs.comet_tags or ()),
        others=dict(logs.comet_others or {}),
        directory=Path(place) if place else None,
    )
