# SPDX-License-Identifier: Apache-2.0
"""The cells of the compatibility matrix: axes, configurations, refusals, and a small set that covers all pairs. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from megatron.errors import NeoXError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.deepspeed import deepspeed_config
from megatron.neox_arguments.unfinished import refuse_unfinished
from support.tiny import tiny

DATA = Path(__file__).resolve().parents[1] / "golden" / "train" / "data"

AXES: dict[str, tuple[Any, ...]] = {
    "style": ("neox", "gpt2", "llama"),
    "precision": ("fp32", "bf16"),
    "tp": (1, 2),
    "sp": (0, 1),
    "cp": (1, 2),
    "pp": (0, 1, 2),
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "full", "selective"),
}
MOST_RANKS = 4
"""Up to here a job is doubled for data parallelism, and the set that covers all pairs stays below."""

STEPS = 4
BATCH = 4
"""Samples per optimizer step, however they are spread."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"checkpoint_activations": False},
    "full": {"checkpoint_activations": True},
    "selective": {"checkpoint_activations": True, "checkpoint_granularity": "selective"},
}


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One combination. pp 0 = the plain engine; sp = sequence_parallel; cp = context_parallel_size; zero = the stage."""

    style: str = "neox"
    precision: str = "fp32"
    tp: int = 1
    sp: int = 0
    cp: int = 1
    pp: int = 0
    zero: int = 0
    recompute: str = "none"

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def model_ranks(self) -> int:
        """Processes that work on the same samples."""
        return self.tp * max(self.pp, 1) * self.cp

    @property
    def world(self) -> int:
        """Processes of the job: data parallelism of 2 where that takes at most MOST_RANKS."""
        return self.model_ranks * (2 if 2 * self.model_ranks <= MOST_RANKS else 1)

    @property
    def reference(self) -> Cell:
        """What the cell must equal: one process, no ZeRO, nothing recomputed."""
        return Cell(style=self.style, precision=self.precision)

    @property
    def job(self) -> Cell:
        """The cell that runs the same job: without tensor parallelism `sequence_parallel` has no effect."""
        return replace(self, sp=0) if self.tp == 1 else self

    def flat(self, *, alone: bool = False, **extra: Any) -> dict[str, Any]:
        """The configuration; `alone` has it run in one process, as a reference does."""
        prefix = {key: [str(DATA / name)] for key, name in _PATHS.items()}
        return tiny(
            self.style,
            **{
                "global_num_gpus": 1 if alone else self.world,
                "train_batch_size": BATCH,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": None,
                "padded_vocab_size": 512,
                "lr_decay_style": "constant",
                "warmup": 0.0,
                # Large steps, so that a wrong gradient shows in the next loss; eps keeps noise from being scaled up to one.
                "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-4}},
                "eval_iters": 1,
                **prefix,
                "model_parallel_size": self.tp,
                "sequence_parallel": bool(self.sp),
                "context_parallel_size": self.cp,
                "pipe_parallel_size": self.pp,
                "zero_optimization": {"stage": self.zero},
                "precision": {"fp32": "fp32", "bf16": "bfloat16"}[self.precision],
                **RECOMPUTE[self.recompute],
                **extra,
            },
        )


_PATHS = {
    "train_data_paths": "chat_document",
    "train_label_data_paths": "chat_label_document",
    "valid_data_paths": "chat_document",
    "valid_label_data_paths": "chat_label_document",
}


def all_cells() -> list[Cell]:
    """Every combination, in a fixed order."""
    return [Cell(**dict(zip(AXES, values, strict=True))) for values in product(*AXES.values())]


@cache
def refusal(cell: Cell) -> str | None:
    """Why the configuration is refused before anything is started, a line per reason; None when it is not."""
    try:
        args = NeoXArgs.from_dict(cell.flat())
        refuse_unfinished(args)
        deepspeed_config(args)
    except NeoXError as error:
        problems = getattr(error, "problems", None)
        return "\n".join(problem.what for problem in problems) if problems else error.what
    return None


def pairs_of(cell: Cell) -> set[tuple[tuple[str, Any], ...]]:
    """Every pair of (axis, value) in a cell."""
    values = [(axis.name, getattr(cell, axis.name)) for axis in fields(cell)]
    return set(combinations(values, 2))


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """A few of `cells` in which every pair of values occurs that occurs in any of them. Greedy and without chance.

    Of equally good cells the one with fewer processes is taken, then the first.
    """
    left = set().union(*(pairs_of(cell) for cell in cells))
    chosen: list[Cell] = []
    while left:
        best = max(cells, key=lambda cell: (len(left & pairs_of(cell)), -cell.world))
        chosen.append(best)
        left -= pairs_of(best)
    return sorted(chosen)


def subset() -> list[Cell]:
    """What runs in the default tests: all pairs of values that are valid together, in jobs of at most MOST_RANKS processes."""
    return covering([cell for cell in all_cells() if cell.world <= MOST_RANKS and refusal(cell) is None])


def selected(cells: Iterable[Cell], only: str) -> list[Cell]:
    """The cells that `only` describes: `tp=2 pp=0,1 style=llama`.

    Raises ValueError for an axis or value that is not there.
    """
    wanted: dict[str, set[str]] = {}
    for term in only.split():
        match = re.fullmatch(r"(\w+)=([\w,]+)", term)
        if match is None or match[1] not in AXES:
            raise ValueError(f"{term!r} is not AXIS=VALUE[,VALUE] of {', '.join(AXES)}")
        wanted[match[1]] = set(match[2].split(","))
        if strange := wanted[match[1]] - {str(value) for value in AXES[match[1]]}:
            raise ValueError(f"{match[1]} has no {', '.join(sorted(strange))}: {', '.join(map(str, AXES[match[1]]))}")
    return [cell for cell in cells if all(str(getattr(cell, axis)) in values for axis, values in wanted.items())]
