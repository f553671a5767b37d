# SPDX-License-Identifier: Apache-2.0
"""Keys for what a run reports, to whom and how often, and for profiling."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .base import NO_EFFECT, RUNTIME, Section, Whole

Block = dict[str, Any] | None


class ServiceKeys(Section):
    """Places that metrics are sent to."""

    use_wandb: bool | None = Field(None, description="Report to Weights & Biases; unset does so when a key is found.")
    wandb_group: str | None = Field(None, description="Group under which Weights & Biases shows the run.")
    wandb_run_name: str | None = Field(None, description="Name of the Weights & Biases run.")
    wandb_team: str | None = Field(None, description="Weights & Biases entity that owns the run.")
    wandb_project: str = Field("neox", description="Weights & Biases project of the run.")
    wandb_host: str = Field("https://api.wandb.ai", description="Address of the Weights & Biases server.")
    wandb_init_all_ranks: bool = Field(False, description="Open a Weights & Biases run on every rank instead of one per machine.")
    wandb: Block = Field(None, description="Settings of DeepSpeed's own Weights & Biases monitor.")
    use_comet: bool | None = Field(None, description="Report to Comet.")
    comet_workspace: str | None = Field(None, description="Comet workspace that owns the experiment.")
    comet_project: str | None = Field(None, description="Comet project of the experiment.")
    comet_experiment_name: str | None = Field(None, description="Name under which Comet shows the experiment.")
    comet_tags: list[str] | None = Field(None, description="Tags of the Comet experiment.")
    comet_others: Block = Field(None, description="Further named values to store with the Comet experiment.")
    comet_experiment: None = Field(None, description="The Comet experiment of a running job.", json_schema_extra=RUNTIME)
    tensorboard: Block = Field(None, description="Settings of DeepSpeed's own TensorBoard monitor.")
    tensorboard_writer: None = Field(None, description="The TensorBoard writer of a running job.", json_schema_extra=RUNTIME)
    tensorboard_dir: str | None = Field(None, description="Folder for TensorBoard event files and profiler traces.")
    csv_monitor: Block = Field(None, description="Settings of DeepSpeed's own CSV monitor.")
    log_dir: str | None = Field(None, description="Folder for metrics.jsonl and for copies of each host's output.")


class ProfileKeys(Section):
    """Time and memory measurements."""

    memory_profiling: bool = Field(
        False, description="Record every allocation on the CUDA device up to profile_step_stop, for PyTorch's memory viewer."
    )
    memory_profiling_path: str | None = Field(
        None, description="Folder for mem_snapshot_rank0.pickle; unset takes tensorboard_dir, log_dir or save."
    )
    profile: bool = Field(False, description="Run the torch profiler over a few steps.")
    profile_step_start: Whole = Field(10, ge=0, description="Step with which profiling begins.")
    profile_step_stop: Whole = Field(12, ge=0, description="Step with which profiling ends.")
    wall_clock_breakdown: bool = Field(
        False, description="Time the phases of each step, which then waits for the device after each of them; reported as timers/<phase>."
    )
    flops_profiler: Block = Field(None, description="Settings of DeepSpeed's FLOPs profiler; needs `enabled`.")
    comms_logger: Block = Field(None, description="Settings of DeepSpeed's log of collective operations.")
    peak_theoretical_tflops: float | None = Field(
        None, gt=0, description="Peak of one device in 10^12 operations per second; giving it adds utilisation to the report."
    )


class WatchKeys(Section):
    """Signs of life of each rank, and what happens when there are none."""

    heartbeat_interval_in_secs: float = Field(
        10.0, gt=0, description="Seconds between two writes of each rank's heartbeat/rank_N.json, in save or else in log_dir."
    )
    hang_timeout_in_mins: float = Field(
        30.0,
        ge=0,
        description="End the run when no rank has made progress for so long, three times as long before the first step is done, and name"
        " the rank that the others wait for; 0 waits for ever.",
    )


class LogsArgs(ServiceKeys, ProfileKeys, WatchKeys):
    """What is reported."""

    git_hash: str | None = Field(None, description="Commit of the code, read from the repository; null outside of one.")
    log_interval: Whole = Field(100, ge=1, description="Steps between two progress lines.")
    log_grad_pct_zeros: bool = Field(
        False, description="Report each step, for each parameter and over all, the percentage of gradient entries that are 0."
    )
    log_param_norm: bool = Field(False, description="Report each step the norm of each parameter and of all.")
    log_grad_norm: bool = Field(False, description="Report each step the norm of each parameter's gradient, before clipping.")
    log_optimizer_states: bool = Field(False, description="Report each step norms of the optimizer's state for each parameter.")
    log_gradient_noise_scale: bool = Field(
        False,
        description="Report the gradient noise scale (arXiv 1812.06162), in samples; needs two micro batches per step or more.",
    )
    gradient_noise_scale_n_batches: Whole = Field(5, ge=1, description="Steps whose estimates are averaged to one noise scale.")
    gradient_noise_scale_cpu_offload: bool = Field(
        False, description="Has no effect: the noise scale is measured without keeping gradients.", json_schema_extra=NO_EFFECT
    )
    steps_per_print: Whole = Field(10, ge=1, description="Steps between two lines of DeepSpeed's own report.")
    dump_state: bool = Field(False, description="Let DeepSpeed print its settings at start.")
