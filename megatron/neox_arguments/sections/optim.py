# SPDX-License-Identifier: Apache-2.0
"""Keys for optimisation: optimizer, learning rate, gradients, precision and ZeRO blocks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .base import DERIVED, Section, Whole

OptimizerType = Literal[
    "adam", "adamw", "onebitadam", "cpu_adam", "cpu_torch_adam", "sm3", "madgrad_wd", "sgd", "lion", "muon"
]  # fmt: skip
Block = dict[str, Any] | None


class ScheduleKeys(Section):
    """The learning rate over time."""

    lr: float | None = Field(
        None, ge=0, description="Peak learning rate; the same as optimizer.params.lr, which it must not contradict. Unset: 0.001."
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt"] = Field(
        "linear", description="Law of the learning rate after warm-up; wsd is constant, then falling (arXiv 2405.18392)."
    )
    lr_decay_iters: Whole | None = Field(
        None, ge=1, description="Step at which the decay has reached min_lr; unset follows lr_decay_fraction, else train_iters."
    )
    lr_decay_fraction: float | None = Field(None, gt=0, le=1, description="lr_decay_iters as a fraction of train_iters.")
    warmup_from_zero: bool = Field(
        False, description="Begin warm-up at a rate of 0, as one fork of GPT-NeoX does; the first step then changes no weight."
    )
    wsd_decay_fraction: float = Field(0.1, gt=0, le=1, description="Last part of lr_decay_iters in which lr_decay_style wsd decays.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay and ever after.")
    warmup: float = Field(0.01, ge=0, le=1, description="Part of lr_decay_iters in which the learning rate rises.")
    override_lr_scheduler: bool = Field(False, description="When resuming, follow this config's schedule, not the checkpoint's.")
    use_checkpoint_lr_scheduler: bool = Field(False, description="When resuming, follow the checkpoint's schedule, not this config's.")
    scheduler: Block = Field(None, description="DeepSpeed's scheduler block; filled in for onebitadam only.")


class PrecisionKeys(Section):
    """Number formats and loss scaling."""

    fp16: Block = Field(None, description="DeepSpeed's fp16 block; needs `enabled`.")
    bf16: Block = Field(None, description="DeepSpeed's bf16 block; needs `enabled`.")
    amp: Block = Field(None, description="DeepSpeed's Apex AMP block; needs `enabled`.")
    loss_scale: float | None = Field(None, ge=0, description="Fixed loss scale of fp16 training; unset or 0 adapts it.")
    dynamic_loss_scale: bool | None = Field(None, description="Whether the loss scale adapts itself.", json_schema_extra=DERIVED)
    hysteresis: Whole = Field(2, ge=1, description="Overflows that fp16 training forgives before it lowers the loss scale.")
    loss_scale_window: float = Field(1000.0, ge=1, description="Steps without overflow after which fp16 training raises the loss scale.")
    min_scale: float = Field(1.0, ge=0, description="Smallest loss scale of fp16 training.")
    communication_data_type: Literal["fp32", "fp16", "bf16", "fp64"] | None = Field(
        None, description="Number format in which gradients are sent; unset leaves it to DeepSpeed."
    )
    data_types: Block = Field(None, description="DeepSpeed's block for the format of accumulated gradients: grad_accum_dtype.")
    fp32_allreduce: bool = Field(False, description="Sum gradients over ranks in fp32.")


class ZeroKeys(Section):
    """Sharding of optimizer state, gradients and weights (arXiv 1910.02054)."""

    zero_optimization: Block = Field(None, description="DeepSpeed's ZeRO block: stage 0 to 3 and its tuning; unset is stage 0.")
    zero_stage: Whole | list[Whole] | Literal["all"] | None = Field(
        None, description="The same as zero_optimization.stage; a list or all is for the autotuner."
    )
    zero_reduce_scatter: bool | None = Field(None, description="The same as zero_optimization.reduce_scatter.")
    zero_contiguous_gradients: bool | None = Field(None, description="The same as zero_optimization.contiguous_gradients.")
    zero_reduce_bucket_size: Whole | None = Field(None, ge=1, description="The same as zero_optimization.reduce_bucket_size, in elements.")
    zero_allgather_bucket_size: Whole | None = Field(
        None, ge=1, description="The same as zero_optimization.allgather_bucket_size, in elements."
    )


class OptimArgs(ScheduleKeys, PrecisionKeys, ZeroKeys):
    """How weights change."""

    optimizer: Block = Field(None, description="Optimizer as {type: NAME, params: {lr: ..., betas: ..., eps: ...}}.")
    optimizer_type: OptimizerType = Field("adam", description="The same as optimizer.type.")
    use_bnb_optimizer: bool = Field(False, description="Use the 8-bit Adam of bitsandbytes.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decay of matrices; norms and biases have none. The same as optimizer.params.weight_decay."
    )
    summed_bias_full_lr: bool = Field(
        False,
        description="With gpt_j_residual, each tensor-parallel rank holds a share of a block's output biases. True: each learns at the"
        " full rate, so their sum learns model_parallel_size times as fast, as in GPT-NeoX. False: the size makes no difference.",
    )
    gradient_clipping: float = Field(
        1.0, ge=0, description="Largest norm of the whole gradient; a longer one is scaled down to it, 0 is off."
    )
    clip_grad: float = Field(1.0, ge=0, description="Another name of gradient_clipping.")
    prescale_gradients: bool = Field(False, description="Divide gradients by the number of ranks before they are summed, not after.")
    gradient_predivide_factor: float = Field(1.0, gt=0, description="Divisor of gradients before they are summed over ranks.")
    sparse_gradients: bool = Field(False, description="Send embedding gradients as rows.")
    deepspeed_extra_args: Block = Field(None, description="Further top-level entries of the DeepSpeed config, passed on as they are.")
    elasticity: Block = Field(None, description="DeepSpeed's block for runs that change their number of ranks.")
    compression_training: Block = Field(None, description="DeepSpeed's block for pruning and quantisation.")
    data_efficiency: Block = Field(None, description="DeepSpeed's block for data sampling and token dropping.")
    autotuning: Block = Field(None, description="DeepSpeed's autotuner block; while it is enabled, values may be 'auto'.")
    checkpoint: Block = Field(None, description="DeepSpeed's block for how checkpoint files are written.")
