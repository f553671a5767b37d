# SPDX-License-Identifier: Apache-2.0
"""Keys for optimisation: optimizer, learning rate, gradients, precision and ZeRO blocks."""

from __future__ import annotations

from typing import Literal

from .base import DERIVED, Block, Section, Whole, key

OptimizerType = Literal[
    "adam", "adamw", "onebitadam", "cpu_adam", "cpu_torch_adam", "sm3", "madgrad_wd", "sgd", "lion", "muon"
]  # fmt: skip


class ScheduleKeys(Section):
    """The learning rate over time."""

    lr: float | None = key(None, "Peak learning rate; the same as optimizer.params.lr, which it must not contradict. Unset: 0.001.", ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt"] = key(
        "linear", "Law of the learning rate after warm-up; wsd is constant, then falling (arXiv 2405.18392)."
    )
    lr_decay_iters: Whole | None = key(
        None, "Step at which the decay has reached min_lr; unset follows lr_decay_fraction, else train_iters.", ge=1
    )
    lr_decay_fraction: float | None = key(None, "lr_decay_iters as a fraction of train_iters.", gt=0, le=1)
    warmup_from_zero: bool = key(
        False, "Begin warm-up at a rate of 0, as one fork of GPT-NeoX does; the first step then changes no weight."
    )
    wsd_decay_fraction: float = key(0.1, "Last part of lr_decay_iters in which lr_decay_style wsd decays.", gt=0, le=1)
    min_lr: float = key(0.0, "Learning rate at the end of the decay and ever after.", ge=0)
    warmup: float = key(0.01, "Part of lr_decay_iters in which the learning rate rises.", ge=0, le=1)
    override_lr_scheduler: bool = key(False, "When resuming, follow this config's schedule, not the checkpoint's.")
    use_checkpoint_lr_scheduler: bool = key(False, "When resuming, follow the checkpoint's schedule, not this config's.")
    scheduler: Block = key(None, "DeepSpeed's scheduler block; filled in for onebitadam only.")


class PrecisionKeys(Section):
    """Number formats and loss scaling."""

    fp16: Block = key(None, "DeepSpeed's fp16 block; needs `enabled`.")
    bf16: Block = key(None, "DeepSpeed's bf16 block; needs `enabled`.")
    amp: Block = key(None, "DeepSpeed's Apex AMP block; needs `enabled`.")
    loss_scale: float | None = key(None, "Fixed loss scale of fp16 training; unset or 0 adapts it.", ge=0)
    dynamic_loss_scale: bool | None = key(None, "Whether the loss scale adapts itself.", DERIVED)
    hysteresis: Whole = key(2, "Overflows that fp16 training forgives before it lowers the loss scale.", ge=1)
    loss_scale_window: float = key(1000.0, "Steps without overflow after which fp16 training raises the loss scale.", ge=1)
    min_scale: float = key(1.0, "Smallest loss scale of fp16 training.", ge=0)
    communication_data_type: Literal["fp32", "fp16", "bf16", "fp64"] | None = key(
        None, "Number format in which gradients are sent; unset leaves it to DeepSpeed."
    )
    data_types: Block = key(None, "DeepSpeed's block for the format of accumulated gradients: grad_accum_dtype.")
    fp32_allreduce: bool = key(False, "Sum gradients over ranks in fp32.")


class ZeroKeys(Section):
    """Sharding of optimizer state, gradients and weights (arXiv 1910.02054)."""

    zero_optimization: Block = key(None, "DeepSpeed's ZeRO block: stage 0 to 3 and its tuning; unset is stage 0.")
    zero_stage: Whole | list[Whole] | Literal["all"] | None = key(
        None, "The same as zero_optimization.stage; a list or all is for the autotuner."
    )
    zero_reduce_scatter: bool | None = key(None, "The same as zero_optimization.reduce_scatter.")
    zero_contiguous_gradients: bool | None = key(None, "The same as zero_optimization.contiguous_gradients.")
    zero_reduce_bucket_size: Whole | None = key(None, "The same as zero_optimization.reduce_bucket_size, in elements.", ge=1)
    zero_allgather_bucket_size: Whole | None = key(None, "The same as zero_optimization.allgather_bucket_size, in elements.", ge=1)


class OptimArgs(ScheduleKeys, PrecisionKeys, ZeroKeys):
    """How weights change."""

    optimizer: Block = key(None, "Optimizer as {type: NAME, params: {lr: ..., betas: ..., eps: ...}}.")
    optimizer_type: OptimizerType = key("adam", "The same as optimizer.type.")
    use_bnb_optimizer: bool = key(False, "Use the 8-bit Adam of bitsandbytes.")
    weight_decay: float = key(0.1, "Decay of matrices; norms and biases have none. The same as optimizer.params.weight_decay.", ge=0)
    summed_bias_full_lr: bool = key(
        False,
        "With gpt_j_residual, each tensor-parallel rank holds a share of a block's output biases. True: each learns at the full rate, so "
        "their sum learns model_parallel_size times as fast, as in GPT-NeoX. False: the size makes no difference.",
    )
    gradient_clipping: float = key(1.0, "Largest norm of the whole gradient; a longer one is scaled down to it, 0 is off.", ge=0)
    clip_grad: float = key(1.0, "Another name of gradient_clipping.", ge=0)
    prescale_gradients: bool = key(False, "Divide gradients by the number of ranks before they are summed, not after.")
    gradient_predivide_factor: float = key(1.0, "Divisor of gradients before they are summed over ranks.", gt=0)
    sparse_gradients: bool = key(False, "Send embedding gradients as rows.")
    deepspeed_extra_args: Block = key(None, "Further top-level entries of the DeepSpeed config, passed on as they are.")
    elasticity: Block = key(None, "DeepSpeed's block for runs that change their number of ranks.")
    compression_training: Block = key(None, "DeepSpeed's block for pruning and quantisation.")
    data_efficiency: Block = key(None, "DeepSpeed's block for data sampling and token dropping.")
    autotuning: Block = key(None, "DeepSpeed's autotuner block; while it is enabled, values may be 'auto'.")
    checkpoint: Block = key(None, "DeepSpeed's block for how checkpoint files are written.")
