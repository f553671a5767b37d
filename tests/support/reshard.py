# SPDX-License-Identifier: Apache-2.0
"""What a rank does to show that a checkpoint goes on at another layout: trains, saves, loads, and gathers weights and optimizer whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from support.jobs import settings

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {"zero_optimization": {"stage": 0}},
    "tensor": {"model_parallel_size": 2},
    "pipeline": {"pipe_parallel_size": 2},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
}
"""Ways in which two processes share a model: what the tests go to and from."""

LAYERS: dict[str, Any] = {"num_layers": 3, "attention_config": [[["global"], 3]]}
"""With two layers, the shares of two data ranks end where parameters end, and none is cut."""

SAVED_AT, BEYOND = 4, 10


def flat_of(folder: str, layout: Mapping[str, Any], style: str, **changes: Any) -> dict[str, Any]:
    """A tiny model without dropout, the same at every layout."""
    same = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "padded_vocab_size": 512, "train_iters": 40, "lr_decay_iters": 40}
    return settings(Path(folder), int(os.environ["WORLD_SIZE"]), style, **{**same, **LAYERS, **changes, **layout})


def forget_groups() -> None:
    """DeepSpeed remembers the groups of the process's first engine; the next one has others."""
    from deepspeed.utils import groups

    groups.mpu = None


class Run:
    """One engine in the ranks of this job.

    source: step folder that it goes on from; optimizer: with its optimizer
    """

    def __init__(self, flat: Mapping[str, Any], source: Path | None = None, *, optimizer: bool = True) -> None:
        from megatron.checkpoint.build import CheckpointSource, Take, compared_args
        from megatron.data.build import build_data
        from megatron.engine.build import build_engine, join_job
        from megatron.engine.restore import TrainPosition, resume
        from megatron.neox_arguments import NeoXArgs
        from megatron.objectives.build import build_objective

        forget_groups()
        self.args = NeoXArgs.from_dict(dict(flat))
        self.groups, device = join_job(self.args)
        self.objective = build_objective(self.args, eod=0)
        data = build_data(self.args, streams=self.objective.streams, rank=self.groups.dp.rank, size=self.groups.dp.size)
        take = Take.EVERYTHING if optimizer else Take.WEIGHTS_AND_POSITION
        origin = CheckpointSource(Take.NOTHING) if source is None else CheckpointSource(take, source.parent, source.name)
        self.engine, self.spec = build_engine(self.args, origin, self.groups, device)
        self.compared = compared_args(self.args)
        position = TrainPosition()
        if source is not None:
            position = resume(self.engine, source, self.spec if optimizer else None, compared=self.compared, batch_size=4, rng=True)
        self.samples = position.samples
        self.batches = data.train.batches(self.objective.collate, start_sample=position.samples)

    def steps(self, count: int) -> tuple[list[float], list[str]]:
        """Losses of so many steps, and a digest of the rows of tokens of each."""
        losses, rows = [], []
        for _ in range(count):
            batch = list(islice(self.batches, self.args.run.gradient_accumulation_steps or 1))
            losses.append(self.engine.train_step(self.objective, batch).metrics["lm_loss"])
            rows.append(self._digest(batch))
            self.samples += 4
        return losses, rows

    def _digest(self, batch: Sequence[Any]) -> str:
        from megatron.mpu.collectives import of_all_ranks

        own = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for micro in batch for row in micro.tokens]
        everybody = [row for rows in of_all_ranks(own, self.groups.dp) for row in rows]
        return hashlib.sha256("".join(sorted(everybody)).encode()).hexdigest()

    def save(self, directory: Path, iteration: int) -> Path:
        """Write a checkpoint; returns the step's folder."""
        from megatron.engine.checkpointer import Checkpointer

        saver = Checkpointer(engine=self.engine, directory=directory, compared=self.compared, configs={})
        saver.save(iteration, self.samples, self.samples * 64, last=True)
        return directory / f"global_step{iteration}"

    def gathered(self) -> dict[str, Any]:
        """Every weight and optimizer state of the whole model by "name" and "name exp_avg", from the shards of all ranks."""
        from megatron.checkpoint.formats.torch_file import canonical_name
        from megatron.mpu.collectives import of_all_ranks

        shards, mine = self.engine.local_shards(), {}
        for name, parameter in self.engine.module().named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            own = {"": shards.weight(parameter), **shards.states(parameter)}
            for key, piece in own.items():
                mine[canonical_name(name), key] = (shape, piece.detach().float().flatten().numpy().copy())
        groups = self.groups
        place = (groups.pp.rank, groups.tp.rank, groups.replicas.rank)
        return _whole(of_all_ranks((place, mine), groups.world), self.spec, groups.tp.size, shards.sharded)


def _whole(everybody: Sequence[Any], spec: Any, tensor_ranks: int, spread: bool) -> dict[str, Any]:
    import numpy as np
    import torch

    from megatron.checkpoint.loading.merge_tp import shardings_of
    from megatron.mpu.sharding import Replicated, Summed, join

    table = shardings_of(spec, tensor_ranks)
    held: dict[Any, dict[Any, dict[int, Any]]] = {}
    for (stage, tensor_rank, replica), mine in sorted(everybody, key=lambda one: one[0]):
        for wanted, (shape, piece) in mine.items():
            held.setdefault(wanted, {}).setdefault((stage, tensor_rank), {})[replica] = (shape, piece)
    whole = {}
    for (name, key), copies in held.items():
        parts = {}
        for (_, tensor_rank), replicas in copies.items():
            shape = next(iter(replicas.values()))[0]
            flats = [piece for _, piece in replicas.values()]
            flat = np.concatenate(flats) if spread else flats[0]
            if not spread and any(other.tobytes() != flat.tobytes() for other in flats):
                raise RuntimeError(f"replicas hold different {name} {key}")
            known = parts.setdefault(tensor_rank, torch.from_numpy(flat).view(shape))
            if not torch.equal(known, torch.from_numpy(flat).view(shape)):
                raise RuntimeError(f"stages hold different {name} {key}")
        how = Replicated() if key and isinstance(table[name], Summed) else table[name]
        ordered = [parts[rank] for rank in range(tensor_ranks)]
        if isinstance(how, Replicated) and any(not torch.equal(part, ordered[0]) for part in ordered):
            raise RuntimeError(f"tensor ranks hold different {name} {key}")
        whole[f"{name} {key}".strip()] = join(ordered, how).numpy()
    return whole


def changes(
    rank: int, world: int, folder: str, layouts: Mapping[str, Mapping[str, Any]], pairs: Sequence[tuple[str, str]], style: str, **more: Any
) -> dict[str, Any]:
    """Train and save at every layout that is a source, then go on from it at every target; what differed, by pair."""
    import numpy as np

    os.chdir(folder)
    saved, found = {}, {}
    for source in sorted({source for source, _ in pairs}):
        run = Run(flat_of(folder, layouts[source], style, **more))
        run.steps(SAVED_AT)
        place = run.save(Path(folder) / source, SAVED_AT)
        held = run.gathered()
        saved[source] = (place, held, *run.steps(BEYOND))
    for source, target in pairs:
        place, held, losses, rows = saved[source]
        run = Run(flat_of(folder, layouts[target], style, **more), place)
        taken = run.gathered()
        again, same_rows = run.steps(BEYOND)
        found[source, target] = {
            "names": sorted(set(held) ^ set(taken)),
            "unequal": sorted(name for name in set(held) & set(taken) if not np.array_equal(held[name], taken[name])),
            "loss": max(abs(a - b) / abs(b) for a, b in zip(again, losses, strict=True)),
            "rows": rows == same_rows,
            "states": sorted({name.partition(" ")[2] for name in taken}),
        }
    return found
