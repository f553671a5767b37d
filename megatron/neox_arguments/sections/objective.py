# SPDX-License-Identifier: Apache-2.0
"""Keys of the training objectives: preferences, rewards, unlearning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Section, Whole


class ObjectiveArgs(Section):
    """What is minimised."""

    train_impl: Literal["normal", "dpo", "rm", "kto", "reinforce"] = Field(
        "normal", description="Objective: language modelling, DPO (arXiv 2305.18290), reward model, KTO (arXiv 2402.01306) or REINFORCE."
    )
    dpo_fp32: bool = Field(True, description="Form DPO's log-probabilities in fp32.")
    dpo_reference_free: bool = Field(False, description="Leave the reference model out of DPO's margin.")
    dpo_beta: float = Field(0.1, gt=0, description="Strength with which DPO holds the policy near the reference.")
    kto_fp32: bool = Field(True, description="Form KTO's log-probabilities in fp32.")
    kto_desirable_weight: float = Field(1.0, ge=0, description="Weight of KTO samples with a positive reward.")
    kto_undesirable_weight: float = Field(1.0, ge=0, description="Weight of KTO samples with a negative reward.")
    z_loss: float = Field(0.0, ge=0, description="Weight of the squared scores in the loss of a reward model.")
    kto_beta: float = Field(0.1, gt=0, description="Strength with which KTO holds the policy near the reference.")
    fp32_reinforce: bool = Field(True, description="Form REINFORCE's log-probabilities in fp32.")
    kl_impl: Literal["abs", "mse", "kl", "full"] = Field(
        "mse",
        description="Estimator of the distance to the reference in REINFORCE: per token (abs, mse, kl) or over the vocabulary (full).",
    )
    kl_div_beta: float = Field(0.1, ge=0, description="Weight of that distance; above 0 a reference model is needed.")
    reinforce_leave_one_out: bool = Field(False, description="Subtract from a reward the mean reward of the prompt's other samples.")
    ga_dataset: str | None = Field(None, description="Prefix of the data to unlearn; giving it turns gradient ascent on.")
    ga_dataset_impl: Literal["infer", "mmap"] = Field("mmap", description="Reader of the data to unlearn.")
    ga_interval: Whole | None = Field(None, ge=1, description="Steps between two bursts of ascent, in ga_mode interval.")
    ga_iters: Whole | None = Field(None, ge=1, description="Ascent steps per burst, in ga_mode interval.")
    ga_lr_scale: float = Field(1.0, gt=0, description="Factor on the learning rate of ascent steps.")
    ga_mode: Literal["interval", "interleaved"] = Field("interval", description="Ascent in bursts, or after every few descent steps.")
    ga_interleave_ratio: Whole = Field(1, ge=1, description="Descent steps per ascent step, in ga_mode interleaved.")
    ga_loss_threshold: float | None = Field(
        None, description="No ascent step is taken while the loss on the data to unlearn is at or below this."
    )
    ga_threshold_check_mode: Literal["per_step", "per_burst", "ema"] = Field(
        "per_step", description="What is compared with the threshold: each step's loss, the burst's first, or a moving average."
    )
    ga_threshold_skip_forward: bool = Field(
        False, description="Spare the forward pass too while the moving average is beyond the threshold."
    )
    gd_mode: bool = Field(
        False, description="Take gradient-difference steps: ascent on the forget data and weighted descent on the retain data."
    )
    gd_retain_dataset: str | None = Field(None, description="Prefix of the data to retain in gradient-difference steps.")
    gd_retain_dataset_impl: Literal["infer", "mmap"] = Field("mmap", description="Reader of the data to retain.")
    gd_retain_weight: float = Field(40.0, ge=0, description="Weight of the retain loss against the forget loss.")
    gd_log_separate_losses: bool = Field(True, description="Report forget, retain and summed loss apart.")
    serve_model_weights: bool = Field(False, description="Offer the current weights to rollout workers on this machine.")
    weight_server_port: Whole | list[Whole] = Field(
        6000, description="TCP port at which rank 0 serves weights, the others counting up from it; or one port per rank."
    )
    precompute_model_name: str | None = Field(
        None, description="Name in the file names of stored reference log-probabilities, which then replace the reference model."
    )
