# SPDX-License-Identifier: Apache-2.0
"""Keys for what a run writes: checkpoints, reports and their services, profiles, heartbeats."""

from __future__ import annotations

from typing import Literal

from .base import NO_EFFECT, RUNTIME, Block, Section, Whole, key


class CheckpointArgs(Section):
    """Where checkpoints are, when they are written and what of them is read."""

    save: str | None = key(None, "Folder that checkpoints are written to; unset writes none.")
    load: str | None = key(
        None,
        "Folder that a checkpoint is read from; hf:FOLDER or hf:OWNER/NAME@REVISION begins with a Hugging Face model; unset starts from "
        "fresh weights.",
    )
    save_hf: bool | Whole = key(
        False,
        "Also write checkpoints as Hugging Face models, to the folder hf in save, while training goes on: all, or those whose step is a "
        "multiple of a number.",
    )
    iteration: Whole | None = key(None, "Step of the checkpoint to read; unset reads the newest that its manifest confirms.", ge=0)
    checkpoint_verify: Literal["full", "size", "off"] = key(
        "full", "What is compared with a checkpoint's manifest before reading it: every file's content, names and sizes, or nothing."
    )
    finetune: bool = key(False, "Read weights only: no optimizer, no random state, step counter back to 0.")
    checkpoint_scale: Literal["linear", "log"] = key("linear", "Steps to save at: multiples (linear) or powers (log) of checkpoint_factor.")
    checkpoint_factor: Whole | float | None = key(
        None, "Steps between two checkpoints (linear, whole, >= 1), or the ratio of their steps (log, > 1)."
    )
    extra_save_iters: list[Whole] | None = key(None, "Further steps to save at; 0 saves the initial weights.")
    checkpoint_async: bool = key(
        False, "Write checkpoints while training goes on, from a copy of the state in host memory; at most one at a time."
    )
    checkpoint_failures_allowed: Whole = key(
        3, "How many saves in a row may fail, each logged and counted, before the next failure ends the run.", ge=0
    )
    no_save_optim: bool = key(False, "Leave the optimizer state out of checkpoints; reading one then needs no_load_optim or finetune.")
    no_save_rng: bool = key(False, "Leave the random state out of checkpoints.")
    no_load_optim: bool = key(False, "Do not read the optimizer state.")
    no_load_rng: bool = key(False, "Do not read the random state.")
    keep_last_n_checkpoints: Whole | None = key(
        None, "Keep only so many of the newest checkpoints, and those of extra_save_iters and keep_every; unset keeps all.", ge=1
    )
    keep_every: Whole | None = key(None, "keep_last_n_checkpoints deletes no checkpoint whose step is a multiple of this.", ge=1)
    checkpoint_validation_with_forward_pass: bool = key(
        False, "Store the logits of a fixed input with each checkpoint and compare them after reading it."
    )
    s3_path: str | None = key(None, "Place s3://bucket/prefix to which every checkpoint is copied, beside the training.")
    s3_chunk_size: Whole = key(104857600, "Bytes per part of an S3 upload, at least 5 MiB; four are in memory at a time.", ge=5242880)
    config_files: dict[str, str] | None = key(None, "Text of the config files by name, copied into every checkpoint.", RUNTIME)


class ServiceKeys(Section):
    """Places that metrics are sent to."""

    use_wandb: bool | None = key(None, "Report to Weights & Biases; unset does so when a key is found.")
    wandb_group: str | None = key(None, "Group under which Weights & Biases shows the run.")
    wandb_run_name: str | None = key(None, "Name of the Weights & Biases run.")
    wandb_team: str | None = key(None, "Weights & Biases entity that owns the run.")
    wandb_project: str = key("neox", "Weights & Biases project of the run.")
    wandb_host: str = key("https://api.wandb.ai", "Address of the Weights & Biases server.")
    wandb_init_all_ranks: bool = key(False, "Open a Weights & Biases run on every rank instead of one per machine.")
    wandb: Block = key(None, "Settings of DeepSpeed's own Weights & Biases monitor.")
    use_comet: bool | None = key(None, "Report to Comet.")
    comet_workspace: str | None = key(None, "Comet workspace that owns the experiment.")
    comet_project: str | None = key(None, "Comet project of the experiment.")
    comet_experiment_name: str | None = key(None, "Name under which Comet shows the experiment.")
    comet_tags: list[str] | None = key(None, "Tags of the Comet experiment.")
    comet_others: Block = key(None, "Further named values to store with the Comet experiment.")
    comet_experiment: None = key(None, "The Comet experiment of a running job.", RUNTIME)
    tensorboard: Block = key(None, "Settings of DeepSpeed's own TensorBoard monitor.")
    tensorboard_writer: None = key(None, "The TensorBoard writer of a running job.", RUNTIME)
    tensorboard_dir: str | None = key(None, "Folder for TensorBoard event files and profiler traces.")
    csv_monitor: Block = key(None, "Settings of DeepSpeed's own CSV monitor.")
    log_dir: str | None = key(None, "Folder for metrics.jsonl and for copies of each host's output.")


class ProfileKeys(Section):
    """Time and memory measurements."""

    memory_profiling: bool = key(False, "Record every allocation on the CUDA device up to profile_step_stop, for PyTorch's memory viewer.")
    memory_profiling_path: str | None = key(None, "Folder for mem_snapshot_rank0.pickle; unset takes tensorboard_dir, log_dir or save.")
    profile: bool = key(False, "Run the torch profiler over a few steps.")
    profile_step_start: Whole = key(10, "Step with which profiling begins.", ge=0)
    profile_step_stop: Whole = key(12, "Step with which profiling ends.", ge=0)
    wall_clock_breakdown: bool = key(
        False, "Time the phases of each step, which then waits for the device after each of them; reported as timers/<phase>."
    )
    flops_profiler: Block = key(None, "Settings of DeepSpeed's FLOPs profiler; needs `enabled`.")
    comms_logger: Block = key(None, "Settings of DeepSpeed's log of collective operations.")
    peak_theoretical_tflops: float | None = key(
        None, "Peak of one device in 10^12 operations per second; giving it adds utilisation to the report.", gt=0
    )


class WatchKeys(Section):
    """Signs of life of each rank, and what happens when there are none."""

    heartbeat_interval_in_secs: float = key(
        10.0, "Seconds between two writes of each rank's heartbeat/rank_N.json, in save or else in log_dir.", gt=0
    )
    hang_timeout_in_mins: float = key(
        30.0,
        "End the run when no rank has made progress for so long, three times as long before the first step is done, and name the rank "
        "that the others wait for; 0 waits for ever.",
        ge=0,
    )


class LogsArgs(ServiceKeys, ProfileKeys, WatchKeys):
    """What is reported."""

    git_hash: str | None = key(None, "Commit of the code, read from the repository; null outside of one.")
    log_interval: Whole = key(100, "Steps between two progress lines.", ge=1)
    log_grad_pct_zeros: bool = key(
        False, "Report each step, for each parameter and over all, the percentage of gradient entries that are 0."
    )
    log_param_norm: bool = key(False, "Report each step the norm of each parameter and of all.")
    log_grad_norm: bool = key(False, "Report each step the norm of each parameter's gradient, before clipping.")
    log_optimizer_states: bool = key(False, "Report each step norms of the optimizer's state for each parameter.")
    log_gradient_noise_scale: bool = key(
        False, "Report the gradient noise scale (arXiv 1812.06162), in samples; needs two micro batches per step or more."
    )
    gradient_noise_scale_n_batches: Whole = key(5, "Steps whose estimates are averaged to one noise scale.", ge=1)
    gradient_noise_scale_cpu_offload: bool = key(False, "Has no effect: the noise scale is measured without keeping gradients.", NO_EFFECT)
    steps_per_print: Whole = key(10, "Steps between two lines of DeepSpeed's own report.", ge=1)
    dump_state: bool = key(False, "Let DeepSpeed print its settings at start.")
