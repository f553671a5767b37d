# SPDX-License-Identifier: Apache-2.0
"""Training step on the CPU: this project's engine against a plain torch + transformers loop, interleaved, on one tiny Pythia.

    python benchmarks/cpu/train_step.py --rounds 7 --threads 1

Each side lives in a process of its own and makes one step in turn, so that both meet the same load. Printed per side: median
seconds of a step, tokens per second, peak resident memory; then the median of the per-round ratios. In fp32 both start from the
same weights, and the largest difference of their losses is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, whose tokenize.py would hide the standard one
SHAPES = {"14m": (6, 128, 4), "31m": (6, 256, 8), "70m": (6, 512, 8)}
VOCAB = 50304


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="14m")
    parser.add_argument("--rows", type=int, default=4, help="sequences per step")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bfloat16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile on our side")
    parser.add_argument("--peer-compile", action="store_true", help="torch.compile on the other side")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def batches(options: argparse.Namespace) -> Callable[[int], object]:
    """step -> [rows, seq + 1] int64, the same on both sides; learnable, so that the loss falls."""
    import torch

    def rows(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(0, VOCAB, (options.rows, 1), generator=generator)
        return (start + torch.arange(options.seq_length + 1) * 7) % VOCAB

    return rows


def peer(options: argparse.Namespace) -> Callable[[int], float]:
    """Plain torch loop on transformers' GPTNeoXForCausalLM: AdamW, clipping at 1."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers, hidden, heads = SHAPES[options.shape]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        rotary_pct=0.25,
        max_position_embeddings=options.seq_length,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).train()
    model.save_pretrained(options.weights)
    run = torch.compile(model) if options.peer_compile else model
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    rows = batches(options)

    def step(index: int) -> float:
        tokens = rows(index)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bfloat16"):
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            loss = run(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def ours(options: argparse.Namespace) -> Callable[[int], float]:
    """This project's engine, the one that trains: DeepSpeed, schedule, clipping, metrics."""
    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.checkpoint.formats.hf_files import read_config, read_state
    from megatron.checkpoint.formats.neox_files import load_canonical
    from megatron.checkpoint.mapping.families import family_of
    from megatron.checkpoint.mapping.rows import to_canonical
    from megatron.engine.build import build_engine, join_job
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.language_model import LanguageModel

    layers, hidden, heads = SHAPES[options.shape]
    args = NeoXArgs.from_dict(
        {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "seq_length": options.seq_length,
            "max_position_embeddings": options.seq_length,
            "pos_emb": "rotary",
            "rotary_pct": 0.25,
            "no_weight_tying": True,
            "gpt_j_residual": True,
            "padded_vocab_size": VOCAB,
            "init_method": "normal",
            "output_layer_init_method": "normal",
            "train_micro_batch_size_per_gpu": options.rows,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
            "weight_decay": 0.1,
            "lr_decay_style": "constant",
            "warmup": 0.0,
            "train_iters": 1000,
            "precision": options.precision,
            "zero_optimization": {"stage": 1 if options.precision == "bfloat16" else 0},
            "torch_compile": options.compile,
            "data_path": "unused",
            "global_num_gpus": 1,
            "seed": 0,
        }
    )
    groups, device = join_job(args)
    engine, spec = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
    if options.precision == "fp32":  # DeepSpeed's bf16 masters are copies made at start
        weights = to_canonical(family_of(read_config(options.weights)), read_state(options.weights), spec)
        load_canonical(engine.module(), weights)
    objective = LanguageModel(eod=VOCAB)
    rows = batches(options)

    def step(index: int) -> float:
        batch = objective.collate([{"text": row.numpy()} for row in rows(index)])
        return engine.train_step(objective, [batch]).metrics["lm_loss"]

    return step


def serve(options: argparse.Namespace) -> None:
    """Worker process: one step per line of standard input, answered by one JSON line."""
    import torch

    torch.set_num_threads(options.threads)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    step = {"ours": ours, "transformers": peer}[options.worker](options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(int(line))
        answer = {"loss": loss, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**answer, "peak_mb": peak / 1024, "start_mb": before / 1024}), file=answers)


class Side:
    """A worker process."""

    def __init__(self, name: str, argv: list[str], threads: int) -> None:
        self.name = name
        self.rows: list[dict[str, float]] = []
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, *argv, "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def step(self, index: int) -> None:
        """One step; keeps its figures."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.process.stdin.write(f"{index}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended early:\n{self.process.stderr.read()[-4000:]}")
        self.rows.append(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.kill()

    def median(self, key: str, skip: int) -> float:
        """Median of one figure over the counted rounds."""
        return statistics.median(row[key] for row in self.rows[skip:])


def main(argv: list[str]) -> int:
    """Run both sides in turn and print the table."""
    options = parse(argv)
    if options.worker:
        serve(options)
        return 0
    warmup = 2
    with tempfile.TemporaryDirectory() as weights:
        argv = [*argv, "--weights", weights]
        theirs = Side("transformers", argv, options.threads)
        theirs.step(0)  # its weights are on disk then
        mine = Side("ours", argv, options.threads)
        mine.step(0)
    sides = [mine, theirs]
    for index in range(1, options.rounds + warmup):
        for side in sides if index % 2 == 0 else sides[::-1]:
            side.step(index)
    for side in sides:
        side.close()
    tokens = options.rows * options.seq_length
    figures = {
        side.name: {
            "tokens_per_s": tokens / side.median("wall", warmup),
            "cpu_s": side.median("cpu", warmup),
            "peak_mb": side.rows[-1]["peak_mb"],
            "step_mb": side.rows[-1]["peak_mb"] - side.rows[-1]["start_mb"],
            "first_loss": side.rows[0]["loss"],
            "last_loss": side.rows[-1]["loss"],
        }
        for side in sides
    }
    rounds = range(warmup, len(mine.rows))
    for key in ("wall", "cpu"):
        figures[f"speed_ratio_{key}"] = statistics.median(theirs.rows[i][key] / mine.rows[i][key] for i in rounds)  # type: ignore[assignment]
    figures["peak_memory_ratio"] = mine.rows[-1]["peak_mb"] / theirs.rows[-1]["peak_mb"]  # type: ignore[assignment]
    figures["largest_loss_difference"] = max(abs(a["loss"] - b["loss"]) for a, b in zip(mine.rows, theirs.rows, strict=True))  # type: ignore[assignment]
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
