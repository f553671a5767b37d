# SPDX-License-Identifier: Apache-2.0
"""Takes up a checkpoint of any layout, optimizer included, in an engine of any other. Knows no configuration object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.formats.neox_files import Gather, bookkeeping, copy_weights, model_ranks, tensor_ranks
from megatron.checkpoint.formats.optimizer_files import read_optimizer, recorded
from megatron.checkpoint.formats.partitions import OptimizerShard
from megatron.checkpoint.formats.state import LazyState
from megatron.checkpoint.loading.merge_tp import Shard, Spreading, read_shards, width_over
from megatron.engine.load_resharded import adopt, refuse_other_numbers, refuse_other_optimizer, say_changed_numbers, trained_parameters
from megatron.engine.zero3_init import whole_while_written
from megatron.errors import CheckpointError
from megatron.model.spec import ModelSpec
from megatron.mpu.groups import Groups


def stored_stages(folder: Path) -> int:
    """How many pipeline stages wrote a folder; 1 without a pipeline."""
    return model_ranks(folder) // max(1, tensor_ranks(folder))


def stored_state(folder: Path, groups: Groups) -> dict[str, Any]:
    """The bookkeeping that this rank goes on from: of its own pipeline stage where there were as many, else of the first."""
    rank = groups.pp.rank * tensor_ranks(folder) if stored_stages(folder) == groups.pp.size else 0
    return bookkeeping(folder, deepspeed_types=True, rank=rank)


def load_resharded(engine: Any, groups: Groups, folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """Read weights and optimizer of `folder` into a fresh DeepSpeed engine; returns the bookkeeping. All ranks call it.

    Tensors are read one at a time. The learning-rate schedule is left to the caller.
    Raises CheckpointError where the optimizer's state is bound to a layout, or not that of this run's optimizer.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    refuse_other_optimizer(type(inner).__name__, recorded(folder, 0).get("kind"))
    optimizers, shards = read_optimizer(folder), read_shards(folder)
    refuse_other_numbers(inner.param_groups, optimizers[0].groups)
    spreading = Spreading(spec, len(shards), groups.tp, rows=width_over(shards, "word_embeddings.weight", 0))
    masters = spreading.weights([one.masters for one in optimizers])
    if missing := sorted({name for name, _ in trained_parameters(engine.module)} - set(masters)):
        raise CheckpointError(
            f"the checkpoint's optimizer does not have {', '.join(missing[:6])}", where=str(folder), fix="set `no_load_optim: true`"
        )
    slots = range(spec.num_layers + 5) if groups.pp.size > 1 else ()
    weights = _over(masters, spreading.weights(shards))
    copy_weights(weights, engine.module, folder, elsewhere=slots, gather=_gather(engine))
    own = OptimizerShard(masters=masters, states=optimizers[0].states, scalars=optimizers[0].scalars, scaling=optimizers[0].scaling)
    adopt(engine, own, partial(_slice, optimizers, spreading), groups.replicas.rank)
    say_changed_numbers(optimizers[0].groups, inner.param_groups)
    state = stored_state(folder, groups)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, int(state.get(name, 0)))
    return state


def _slice(optimizers: Sequence[OptimizerShard], spreading: Spreading, key: str) -> Mapping[str, Tensor]:
    return spreading.states([one.states[key] for one in optimizers], key)


def _over(masters: Shard, weights: Shard) -> Shard:
    """The masters, and what is not trained as the weights have it."""
    return LazyState({name: partial((masters if name in masters else weights).__getitem__, name) for name in {**dict.fromkeys(weights)}})


def _gather(engine: Any) -> Gather | None:
    return _whole if engine.zero_optimization_stage() == 3 else None


def _whole(tensors: Any) -> AbstractContextManager[Any]:
    return whole_while_written([tensor for tensor in tensors if hasattr(tensor, "ds_id")])
