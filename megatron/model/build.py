# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs and a ModelSpec -> Transformer | PipelineModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron.model.build_spec import build_spec
from megatron.model.init import Gather
from megatron.model.pipeline import PipelineChoices, pipeline_module, topology_of
from megatron.model.recompute import Granularity, Recompute
from megatron.model.spec import ModelSpec
from megatron.model.transformer import StagedTransformer, Transformer
from megatron.mpu.groups import Groups
from megatron.neox_arguments import NeoXArgs


def build_transformer(
    args: NeoXArgs,
    spec: ModelSpec | None = None,
    *,
    groups: Groups | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    gather: Gather | None = None,
) -> Transformer:
    """The model of `args`, as much of it as this rank holds, with initial weights (none on device "meta").

    spec:   None = `build_spec(args)`
    dtype:  of the parameters; None = the `precision` key's, or with `gather` what the enclosing context decides
    gather: see `Transformer`
    """
    # A model in stages that is trained is DeepSpeed's module, see `build_pipeline`.
    kind = StagedTransformer if groups is not None and groups.pp.size > 1 else Transformer
    model = kind(
        spec or build_spec(args),
        groups=groups,
        device=device,
        dtype=parameter_dtype(args) if dtype is None and gather is None else dtype,
        recompute=recompute_of(args),
        seed=args.run.seed,
        gather=gather,
    )
    if args.run.torch_compile:
        model.compile_blocks()
    return model


def build_pipeline(
    args: NeoXArgs, spec: ModelSpec, *, loss_fn: Callable[[Any, tuple[torch.Tensor, ...]], torch.Tensor], groups: Groups
) -> nn.Module:
    """The model of `args` as the pipeline stages of this process (a PipelineModule); torch.distributed must be initialised.

    loss_fn: see `pipeline_module`
    """
    runtime = args.runtime
    # DeepSpeed counts the ranks that share a sequence among those with the same weights, which they have.
    replicas = args.data_parallel_size * runtime.context_parallel_size
    choices = PipelineChoices(
        partition_method=runtime.pipe_partition_method,
        recompute=recompute_of(args),
        compile_blocks=args.run.torch_compile,
    )
    module: nn.Module = pipeline_module(
        spec,
        topology=topology_of(runtime.pipe_parallel_size, replicas, runtime.model_parallel_size),
        loss_fn=loss_fn,
        groups=groups,
        seed=args.run.seed,
        dtype=parameter_dtype(args),
        choices=choices,
    )
    return module


def recompute_of(args: NeoXArgs) -> Recompute | None:
    """The activation checkpointing keys; None = off."""
    run = args.run
    if not run.checkpoint_activations:
        return None
    return Recompute(
        num_layers=run.checkpoint_num_layers,
        granularity=Granularity(run.checkpoint_granularity),
        on_host=run.checkpoint_in_cpu,
        partitioned=run.partition_activations,
    )


def parameter_dtype(args: NeoXArgs) -> torch.dtype:
    """The `precision` key as a dtype."""
    return {"fp16": torch.float16, "bfloat16": torch.bfloat16}.get(args.model.precision or "fp32", torch.float32)
