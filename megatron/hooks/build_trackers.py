# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> the experiment trackers that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.errors import ConfigError
from megatron.hooks.trackers import (
    CometSink,
    Opener,
    TensorBoardSink,
    WandbSink,
    require,
    wandb_key_found,
    wandb_offline,
)

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs


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
    place = logs.log_dir or args.checkpoint.save
    folder = Path(place) if place else None
    if (wandb := _wandb_run(args, rank, ids)) is not None:
        openers["Weights & Biases"] = lambda start: WandbSink(wandb, config=config, host=logs.wandb_host, directory=folder)
    if logs.use_comet and rank == 0:
        require("comet_ml", where="use_comet")
        fresh = {"experiment_key": ids["comet"], "workspace": logs.comet_workspace, "project_name": logs.comet_project}
        experiment = {"previous_experiment": ids["comet"]} if resumed else fresh
        told: dict[str, Any] = {
            "name": logs.comet_experiment_name,
            "tags": tuple(logs.comet_tags or ()),
            "others": dict(logs.comet_others or {}),
        }
        openers["Comet"] = lambda start: CometSink(experiment, config=config, directory=folder, **told)
    return openers


def _wandb_run(args: NeoXArgs, rank: int, ids: Mapping[str, str]) -> dict[str, Any] | None:
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
    return {
        "id": ids["wandb"] + suffix,
        "project": logs.wandb_project,
        "group": logs.wandb_group,
        "name": logs.wandb_run_name + suffix if logs.wandb_run_name else None,
        "entity": logs.wandb_team,
    }
