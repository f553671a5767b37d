# SPDX-License-Identifier: Apache-2.0
"""What the engine and parallelism cost on the CPU: steps of one model under several layouts, which take turns.

    python benchmarks/cpu/parallel_overhead.py --rounds 9

One process: a plain torch loop over the same model, and this project's engines around it. Two processes (gloo), one thread each: every
way to share the work. Printed per side: median seconds of a step, the ratio to the plain loop's, and the share of the step's time that
rank 0 spends in collectives and point-to-point calls, waiting for the other rank included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, whose tokenize.py would hide the standard one
PLAIN = "plain torch loop"
SIDES: dict[str, tuple[int, dict[str, Any]]] = {
    PLAIN: (1, {}),
    "engine": (1, {}),
    "pipeline engine, 1 stage": (1, {"pipe_parallel_size": 1}),
    "2 data ranks": (2, {}),
    "2 data ranks, ZeRO 1": (2, {"zero_optimization": {"stage": 1}}),
    "2 data ranks, ZeRO 2": (2, {"zero_optimization": {"stage": 2}}),
    "2 data ranks, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
    "2 tensor ranks": (2, {"model_parallel_size": 2}),
    "2 tensor ranks, sequence parallel": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "2 context ranks": (2, {"context_parallel_size": 2}),
    "2 pipeline stages": (2, {"pipe_parallel_size": 2}),
}
CALLS = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("reduce", "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "broadcast_object_list", "all_gather_object"),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="sequences per step over all ranks")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=4, help="micro batches of a step in one process; each data rank has its share")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="sides whose name contains one of these; the plain loop is always there")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def config(options: argparse.Namespace, world: int, layout: dict[str, Any]) -> dict[str, Any]:
    """A LLaMA-like model, fp32."""
    data = world // (layout.get("model_parallel_size", 1) * layout.get("context_parallel_size", 1) * layout.get("pipe_parallel_size", 1))
    return {
        "num_layers": options.layers,
        "hidden_size": options.hidden_size,
        "num_attention_heads": options.hidden_size // 64,
        "seq_length": options.seq_length,
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "mlp_multiple_of": 64,
        "no_weight_tying": True,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "padded_vocab_size": options.vocab,
        "train_micro_batch_size_per_gpu": options.rows // options.micro_batches,
        "gradient_accumulation_steps": options.micro_batches // data,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
        "lr_decay_style": "constant",
        "warmup": 0.0,
        "train_iters": 1000,
        "data_path": "unused",
        "global_num_gpus": world,
        **layout,
    }


def micro_batches(options: argparse.Namespace, objective: Any, index: int) -> list[Any]:
    """The whole step's micro batches, the same on every side; learnable, so that the loss falls."""
    import torch

    generator = torch.Generator().manual_seed(index)
    start = torch.randint(0, options.vocab, (options.rows, 1), generator=generator)
    rows = (start + torch.arange(options.seq_length + 1) * 7) % options.vocab
    return [objective.collate([{"text": row.numpy()} for row in part]) for part in rows.chunk(options.micro_batches)]


def plain(options: argparse.Namespace) -> Callable[[int], float]:
    """The same model and loss under a plain loop: AdamW, clipping at 1."""
    import torch

    from megatron.engine.loss_normalization import contexts, step_totals, targets_of
    from megatron.model.build import build_transformer
    from megatron.mpu.context import ContextPlan
    from megatron.mpu.groups import Group
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.language_model import LanguageModel
    from megatron.optim.groups import parameter_groups

    model = build_transformer(NeoXArgs.from_dict(config(options, 1, {}))).train()
    objective, cpu = LanguageModel(eod=options.vocab), torch.device("cpu")
    groups = parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(index: int) -> float:
        batches = micro_batches(options, objective, index)
        context_of = contexts(step_totals(objective, batches, Group.single(), cpu).denominators, ContextPlan())
        total = 0.0
        for batch in batches:
            targets = targets_of(batch, cpu)
            loss = objective.loss(model(batch.tokens, batch.segment_ids), targets, context_of(batch, targets)).loss
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def engine(options: argparse.Namespace, world: int, layout: dict[str, Any]) -> Callable[[int], float]:
    """This project's engine, the one that trains."""
    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.engine.build import build_engine, join_job
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.language_model import LanguageModel

    args = NeoXArgs.from_dict(config(options, world, layout))
    groups, device = join_job(args)
    running, _ = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
    objective = LanguageModel(eod=options.vocab)

    def step(index: int) -> float:
        batches = micro_batches(options, objective, index)[groups.dp.rank :: groups.dp.size]
        return running.train_step(objective, batches).metrics["lm_loss"]

    return step


class Clock:
    """Seconds spent in calls of torch.distributed, the waits for asynchronous ones among them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def watch(self) -> None:
        """From now on every communication call is timed."""
        import torch
        import torch.distributed as dist

        values = torch.ops._c10d_functional
        for name in CALLS:
            setattr(dist, name, self.timed(getattr(dist, name)))
        for name in ("all_reduce", "reduce_scatter_tensor", "wait_tensor"):
            setattr(values, name, Operator(getattr(values, name), self))

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed where it is not made by another timed one."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started, self._depth = time.perf_counter(), self._depth + 1
            try:
                result = call(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - started
            if isinstance(result, list):
                return [Handle(item, self) for item in result]
            return Handle(result, self) if hasattr(result, "wait") else result

        return run


class Handle:
    """A handle of an asynchronous call, whose waits are timed."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner = inner
        self.wait = clock.timed(inner.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Operator:
    """An operator of torch whose calls are timed; its overloads and all else are the operator's own."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner = inner
        self._call = clock.timed(inner)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def serve(options: argparse.Namespace) -> None:
    """Worker process: one step per line of standard input, answered by one JSON line."""
    import torch

    torch.set_num_threads(options.threads)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    clock = Clock()
    clock.watch()
    world, layout = SIDES[options.worker]
    step = plain(options) if options.worker == PLAIN else engine(options, world, layout)
    for line in sys.stdin:
        clock.seconds, started = 0.0, time.perf_counter()
        loss = step(int(line))
        print(json.dumps({"loss": loss, "wall": time.perf_counter() - started, "communication": clock.seconds}), file=answers)


class Side:
    """The processes of one layout."""

    def __init__(self, name: str, argv: list[str], threads: int) -> None:
        self.name = name
        self.rows: list[dict[str, float]] = []
        self.world = SIDES[name][0]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
        common = {**os.environ, **job, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, *argv, "--worker", name]
        pipe = subprocess.PIPE
        self.ranks = [
            subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL if rank else pipe, text=True,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(self.world)
        ]  # fmt: skip

    def step(self, index: int) -> None:
        """One step of all ranks; keeps the figures of the first."""
        for process in self.ranks:
            assert process.stdin
            process.stdin.write(f"{index}\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.ranks if process.stdout]
        if not all(lines):
            assert self.ranks[0].stderr
            self.close()
            sys.exit(f"{self.name} ended early:\n{self.ranks[0].stderr.read()[-4000:]}")
        self.rows.append(json.loads(lines[0]))

    def close(self) -> None:
        """End the processes."""
        for process in self.ranks:
            process.kill()

    def median(self, key: str, skip: int) -> float:
        """Median of one figure over the counted rounds."""
        return statistics.median(row[key] for row in self.rows[skip:])


def figures_of(sides: list[Side], options: argparse.Namespace, warmup: int) -> dict[str, dict[str, float]]:
    """Per side: seconds, tokens per second, speed against the plain loop and against one rank, share of communication, last loss."""
    tokens = options.rows * options.seq_length
    rounds = range(warmup, len(sides[0].rows))
    base = {side.name: side for side in sides}

    def speed(side: Side, against: str) -> float:
        other = base.get(against)
        return float("nan") if other is None else statistics.median(other.rows[i]["wall"] / side.rows[i]["wall"] for i in rounds)

    return {
        side.name: {
            "step_s": side.median("wall", warmup),
            "tokens_per_s": tokens / side.median("wall", warmup),
            "speed_to_plain": speed(side, PLAIN),
            "speed_to_engine": speed(side, "engine"),
            "communication_share": statistics.median(side.rows[i]["communication"] / side.rows[i]["wall"] for i in rounds),
            "last_loss": side.rows[-1]["loss"],
        }
        for side in sides
    }


def main(argv: list[str]) -> int:
    """Run all sides in turn and print the table."""
    options = parse(argv)
    if options.worker:
        serve(options)
        return 0
    warmup = 2
    names = [name for name in SIDES if name == PLAIN or not options.only or any(word in name for word in options.only)]
    sides = []
    for name in names:  # one after the other: their starts would disturb each other
        sides.append(Side(name, argv, options.threads))
        sides[-1].step(0)
    for index in range(1, options.rounds + warmup):
        for side in sides if index % 2 == 0 else sides[::-1]:
            side.step(index)
    for side in sides:
        side.close()
    figures = figures_of(sides, options, warmup)
    print(
        "| side | step s | tokens/s | speed to plain loop | speed to one rank | communication | last loss |\n|---|---|---|---|---|---|---|"
    )
    for name, row in figures.items():
        print(
            f"| {name} | {row['step_s']:.3f} | {row['tokens_per_s']:.0f} | {row['speed_to_plain']:.2f} | {row['speed_to_engine']:.2f} "
            f"| {100 * row['communication_share']:.0f} % | {row['last_loss']:.6f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
