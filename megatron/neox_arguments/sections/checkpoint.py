# SPDX-License-Identifier: Apache-2.0
"""Keys for saving and loading checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import RUNTIME, Section, Whole


class CheckpointArgs(Section):
    """Where checkpoints are, when they are written and what of them is read."""

    save: str | None = Field(None, description="Folder that checkpoints are written to; unset writes none.")
    load: str | None = Field(
        None,
        description="Folder that a checkpoint is read from; hf:FOLDER or hf:OWNER/NAME@REVISION begins with a Hugging Face model; "
        "unset starts from fresh weights.",
    )
    save_hf: bool | Whole = Field(
        False,
        description="Also write checkpoints as Hugging Face models, to the folder hf in save, while training goes on: all, or those whose "
        "step is a multiple of a number.",
    )
    iteration: Whole | None = Field(
        None, ge=0, description="Step of the checkpoint to read; unset reads the newest that its manifest confirms."
    )
    checkpoint_verify: Literal["full", "size", "off"] = Field(
        "full",
        description="What is compared with a checkpoint's manifest before reading it: every file's content, names and sizes, or nothing.",
    )
    finetune: bool = Field(False, description="Read weights only: no optimizer, no random state, step counter back to 0.")
    checkpoint_scale: Literal["linear", "log"] = Field(
        "linear", description="Steps to save at: multiples (linear) or powers (log) of checkpoint_factor."
    )
    checkpoint_factor: Whole | float | None = Field(
        None, description="Steps between two checkpoints (linear, whole, >= 1), or the ratio of their steps (log, > 1)."
    )
    extra_save_iters: list[Whole] | None = Field(None, description="Further steps to save at; 0 saves the initial weights.")
    checkpoint_async: bool = Field(
        False, description="Write checkpoints while training goes on, from a copy of the state in host memory; at most one at a time."
    )
    checkpoint_failures_allowed: Whole = Field(
        3, ge=0, description="How many saves in a row may fail, each logged and counted, before the next failure ends the run."
    )
    no_save_optim: bool = Field(
        False, description="Leave the optimizer state out of checkpoints; reading one then needs no_load_optim or finetune."
    )
    no_save_rng: bool = Field(False, description="Leave the random state out of checkpoints.")
    no_load_optim: bool = Field(False, description="Do not read the optimizer state.")
    no_load_rng: bool = Field(False, description="Do not read the random state.")
    keep_last_n_checkpoints: Whole | None = Field(
        None,
        ge=1,
        description="Keep only so many of the newest checkpoints, and those of extra_save_iters and keep_every; unset keeps all.",
    )
    keep_every: Whole | None = Field(
        None, ge=1, description="keep_last_n_checkpoints deletes no checkpoint whose step is a multiple of this."
    )
    checkpoint_validation_with_forward_pass: bool = Field(
        False, description="Store the logits of a fixed input with each checkpoint and compare them after reading it."
    )
    s3_path: str | None = Field(None, description="Place s3://bucket/prefix to which every checkpoint is copied, beside the training.")
    s3_chunk_size: Whole = Field(
        104857600, ge=5242880, description="Bytes per part of an S3 upload, at least 5 MiB; four are in memory at a time."
    )
    config_files: dict[str, str] | None = Field(
        None, description="Text of the config files by name, copied into every checkpoint.", json_schema_extra=RUNTIME
    )
