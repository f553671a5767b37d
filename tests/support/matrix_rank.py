# SPDX-License-Identifier: Apache-2.0
"""What one rank of a cell does: trains a tiny model for some steps and gathers its weights. Knows no axis and no tolerance."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job. Everything can be pickled.

    flat:      the configuration
    steps:     optimizer steps
    weights:   file that weights are written to (a reference) or compared with
    is_reference: which of the two
    fault:     a fault of the test's to be noticed, by name; see FAULTS
    """

    flat: dict[str, Any]
    steps: int
    weights: str
    is_reference: bool
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0 saw.

    losses, norms: per step; the norm before clipping
    evaluation:    loss of one more pass without a step
    initial:       weights before the first step, name -> digest of the whole tensor
    unequal:       weights of which ranks that should hold the same bits did not, before or after
    drift:         distance of the last weights from the reference's / length of the way these went; 0 for a reference
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    evaluation: float
    initial: dict[str, str]
    unequal: tuple[str, ...] = ()
    drift: float
    seconds: float


def run_rank(rank: int, world: int, task: Task) -> Outcome:
    """Train. Environment variables say who this rank is and where the others are."""
    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.data.build import build_data
    from megatron.engine.build import build_engine, join_job
    from megatron.engine.distributed import stop
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.build import build_objective

    started = time.perf_counter()
    if task.fault is not None:
        FAULTS[task.fault](rank)
    args = NeoXArgs.from_dict(task.flat)
    groups, device = join_job(args)
    objective = build_objective(args, eod=0)
    data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size)
    engine, spec = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
    first, unequal = whole_weights(engine, spec, groups)
    batches = data.train.batches(objective.collate, start_sample=0)
    accumulate = args.run.gradient_accumulation_steps or 1
    results = [engine.train_step(objective, list(islice(batches, accumulate))) for _ in range(task.steps)]
    held_out = data.valid.batches(objective.collate, start_sample=0)
    evaluation = engine.eval_step(objective, islice(held_out, (args.run.train_batch_size or 1) // args.data_parallel_size))
    last, unequal_later = whole_weights(engine, spec, groups)
    outcome = Outcome(
        losses=tuple(result.metrics["lm_loss"] for result in results),
        norms=tuple(float(result.grad_norm) for result in results if result.grad_norm is not None),
        evaluation=evaluation["lm_loss"],
        initial={name: hashlib.sha256(value.tobytes()).hexdigest()[:16] for name, value in first.items()},
        unequal=tuple(sorted(unequal | unequal_later)),
        drift=_drift(task, first, last) if rank == 0 else 0.0,
        seconds=time.perf_counter() - started,
    )
    same = (outcome.losses, outcome.norms, outcome.evaluation)
    _require_same(same, groups)
    stop()
    return outcome


def whole_weights(engine: Any, spec: Any, groups: Any) -> tuple[dict[str, Any], set[str]]:
    """Every weight of the whole model as a float32 array by canonical name, and the names of those whose copies are not equal.

    Both on global rank 0 only. Copies are those of replicas, of stages that share a weight, and of tensor ranks that do not split it.
    """
    import deepspeed
    import torch.distributed as dist

    from megatron.checkpoint.formats.torch_file import canonical_name

    partitioned = [parameter for parameter in engine.module().parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext():
        mine = {canonical_name(name): parameter.detach().float().numpy().copy() for name, parameter in engine.module().named_parameters()}
    if groups.world.size == 1:
        return mine, set()
    everybody: list[Any] = [None] * groups.world.size
    dist.all_gather_object(everybody, (groups.tp.rank, mine))
    return _joined(everybody, spec, groups.tp.size) if groups.world.rank == 0 else ({}, set())


def _joined(everybody: list[tuple[int, dict[str, Any]]], spec: Any, tensor_ranks: int) -> tuple[dict[str, Any], set[str]]:
    import torch

    from megatron.checkpoint.loading.merge_tp import shardings_of
    from megatron.mpu.sharding import Replicated, join

    table = shardings_of(spec, tensor_ranks)
    shards: dict[str, dict[int, Any]] = {}
    unequal = set()
    for tensor_rank, weights in everybody:
        for name, value in weights.items():
            known = shards.setdefault(name, {}).setdefault(tensor_rank, value)
            if known.tobytes() != value.tobytes():
                unequal.add(name)
    whole = {}
    for name, parts in shards.items():
        ordered = [parts[rank] for rank in range(tensor_ranks)]
        if isinstance(table[name], Replicated) and any(part.tobytes() != ordered[0].tobytes() for part in ordered):
            unequal.add(name)
        whole[name] = join([torch.from_numpy(part) for part in ordered], table[name]).numpy()
    return whole, unequal


def _drift(task: Task, first: Mapping[str, Any], last: Mapping[str, Any]) -> float:
    import numpy as np

    path = Path(task.weights)
    if task.is_reference:
        np.savez(path, **last)
        return 0.0
    other = np.load(path)
    if set(other) != set(last):
        raise RuntimeError(f"not the reference's weights: {sorted(set(other) ^ set(last))[:6]}")
    off = sum(float(((last[name] - other[name]).astype(np.float64) ** 2).sum()) for name in last)
    way = sum(float(((other[name] - first[name]).astype(np.float64) ** 2).sum()) for name in last)
    return float((off / way) ** 0.5)


def _require_same(said: Any, groups: Any) -> None:
    """Every rank reports the same numbers, or the job is wrong."""
    import torch.distributed as dist

    if groups.world.size == 1:
        return
    everybody: list[Any] = [None] * groups.world.size
    dist.all_gather_object(everybody, said)
    if any(other != everybody[0] for other in everybody):
        raise RuntimeError(f"ranks report different numbers: {everybody}")


def _hang(rank: int) -> None:
    time.sleep(3600)


def _raise_on_last(rank: int) -> None:
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        raise RuntimeError("a fault on purpose")


def _die(rank: int) -> None:
    if rank == 0:
        os.abort()


def _forget_tensor_sums(rank: int) -> None:
    """Partial sums of split layers stay partial."""
    from megatron.mpu import comm

    comm._PASSES = {**comm._PASSES, "reduce": (comm._same, comm._same)}


def _forget_input_gradients(rank: int) -> None:
    """Gradients that flow out of split layers stay partial."""
    from megatron.mpu import comm

    comm._PASSES = {**comm._PASSES, "copy": (comm._same, comm._same)}


def _halve_the_gradient(rank: int) -> None:
    """The mean over two replicas where the sum belongs."""
    import deepspeed

    whole = deepspeed.DeepSpeedEngine.backward
    deepspeed.DeepSpeedEngine.backward = lambda self, loss, **rest: whole(self, loss / 2, **rest)


FAULTS: dict[str, Callable[[int], None]] = {
    "hang": _hang,
    "raise": _raise_on_last,
    "die": _die,
    "no tensor sums": _forget_tensor_sums,
    "no input gradient sums": _forget_input_gradients,
    "half the gradient": _halve_the_gradient,
}
"""Faults of a rank's, set before it joins the job, with which the tests show that they are noticed."""
