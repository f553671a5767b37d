# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on this machine: bandwidth against raw files and `torch.save`, the cost of hashing, what a save does to training.

    python benchmarks/checkpoint.py --megabytes 512 --rounds 7 --folder /where/checkpoints/go

Files: every side writes (and reads) the same bytes and takes its turn in each round; every write ends with fsync, and every read begins
with the file out of the page cache. Training: an engine makes steps, saving at once or in the background, in a process of its own.
Printed: medians, and medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"14m": (6, 128, 4), "31m": (6, 256, 8), "70m": (6, 512, 8)}
VOCAB = 50304
MODES = ("at once", "in the background")
SAMPLED_S = 0.002


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the file that is written and read")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=SHAPES, default="31m", help="of the model that is trained and saved")
    parser.add_argument("--tokens", type=int, default=256, help="per step")
    parser.add_argument("--saves", type=int, default=4, help="of a training run")
    parser.add_argument("--folder", type=Path, help="where files are written; by default the system's temporary folder")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class NoDigest:
    """In the place of a digest, to measure what it costs."""

    def update(self, data: bytes) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """Nothing."""
        return ""


def sides(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Ways to write a file of the wanted size, and ways to read it."""
    import torch

    from megatron.atomic_io import digest_of
    from megatron.checkpoint.formats.torch_file import read_torch_file
    from megatron.checkpoint.steps import write

    torch.set_num_threads(1)
    count = options.megabytes * (1 << 20) // 4 // 16
    state = {f"w{number}": torch.randn(count) for number in range(16)}
    path, kept = folder / "written", folder / "kept.pt"

    def synced() -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def raw() -> None:
        with path.open("wb", buffering=0) as file:
            for tensor in state.values():
                file.write(memoryview(tensor.numpy()).cast("B"))
        synced()

    def plain() -> None:
        torch.save(state, path)
        synced()

    def unhashed() -> None:
        with mock.patch.object(write, "new_digest", NoDigest):
            write.write_torch_file(state, path)

    def two_files() -> None:
        halves = Path(folder / "two")
        halves.mkdir(exist_ok=True)
        names, both = list(state), write.Writing(halves)
        for number, part in enumerate((names[:8], names[8:])):
            both.add({name: state[name] for name in part}, halves / f"{number}.pt")
        assert not both.wait().problems

    write.write_torch_file(state, kept)

    def read() -> None:
        with kept.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass

    def mapped() -> None:
        for tensor in read_torch_file(kept).values():
            tensor.clone()

    writes = {
        "raw file": raw,
        "torch.save": plain,
        "ours": lambda: write.write_torch_file(state, path),
        "ours, without hashing": unhashed,
        "ours, as two files at a time": two_files,
    }
    reads = {
        "raw file": read,
        "torch.load": lambda: torch.load(kept, weights_only=True),
        "ours (mapped), each tensor copied": mapped,
        "verifying its digest": lambda: digest_of(kept),
    }
    return writes, reads


def rounds(
    calls: dict[str, Callable[[], object]], count: int, prepare: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every call, and those of its threads on a core; all take turns, and one round more comes first, to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    worked: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 1):
        for name, call in calls.items():
            prepare()
            since, before = time.perf_counter(), time.process_time()
            call()
            if number:
                taken[name].append(time.perf_counter() - since)
                worked[name].append(time.process_time() - before)
    return taken, worked


def files(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Bandwidths, printed."""
    writes, reads = sides(options, folder)

    def fresh() -> None:
        (folder / "written").unlink(missing_ok=True)
        shutil.rmtree(folder / "two", ignore_errors=True)
        os.sync()

    def uncached() -> None:
        handle = os.open(folder / "kept.pt", os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)

    gigabytes, found = options.megabytes * (1 << 20) / 1e9, {}
    for title, calls, prepare, peer in (("writing", writes, fresh, "torch.save"), ("reading", reads, uncached, "torch.load")):
        taken, worked = rounds(calls, options.rounds, prepare)
        found[title] = {"seconds": taken, "CPU seconds": worked}
        head = (f"{title} {options.megabytes} MiB", "s", "GB/s", "of the raw file's speed", f"of {peer}'s speed", "CPU s")
        print(f"\n| {' | '.join(head)} |\n|---|---|---|---|---|---|")
        for name, seconds in taken.items():
            shares = [ratio(taken[other], seconds) for other in ("raw file", peer)]
            median, cpu = statistics.median(seconds), statistics.median(worked[name])
            print(f"| {name} | {median:.3f} | {gigabytes / median:.2f} | {shares[0]:.2f} | {shares[1]:.2f} | {cpu:.2f} |")
        if title == "writing":
            cost = 100 * (ratio(taken["ours"], taken["ours, without hashing"]) - 1)
            peer_cost = 100 * (ratio(taken["ours"], taken["torch.save"]) - 1)
            print(f"\nHashing costs {cost:.0f} % of the save without it, and {peer_cost:.0f} % against torch.save and fsync.")
    return found


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(one / other for one, other in zip(numerator, denominator, strict=True))


class Memory:
    """The largest resident memory of this process within a block, over `base` bytes, in MB."""

    def __init__(self, base: int) -> None:
        self.base = base

    def __enter__(self) -> Memory:
        self.most = resident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def over(self) -> float:
        """MB."""
        return (self.most - self.base) / 1e6

    def _watch(self) -> None:
        while not self._end.wait(SAMPLED_S):
            self.most = max(self.most, resident())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker(options: argparse.Namespace) -> dict[str, object]:
    """Train and save in one mode; figures of each save."""
    import torch

    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.engine.build import build_engine, join_job
    from megatron.engine.checkpointer import Checkpointer
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.language_model import LanguageModel

    torch.set_num_threads(1)
    args = NeoXArgs.from_dict(flat(options))
    groups, device = join_job(args)
    engine, _ = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
    objective = LanguageModel(eod=VOCAB)
    saver = Checkpointer(
        engine=engine, directory=options.folder, compared={}, configs={}, background=options.worker == MODES[1], keep_last=1
    )

    def step() -> float:
        batch = objective.collate([{"text": torch.randint(0, VOCAB, (options.tokens + 1,)).numpy()}])
        since = time.perf_counter()
        engine.train_step(objective, [batch])
        return time.perf_counter() - since

    def save(number: int) -> dict[str, float]:
        steps, used = [step() for _ in range(5)], 0
        usual = statistics.median(steps)
        with Memory(base) as memory:
            since = time.perf_counter()
            saver.save(number, number, number)
            stands = time.perf_counter() - since
            slower = 0.0
            while saver.saved != number:
                slower += step() - usual
                since = time.perf_counter()
                saver.poll()
                stands += time.perf_counter() - since
                used += 1
        return {"usual": usual, "stands": stands, "slower": slower, "steps": used, "memory": memory.over, "whole": saver.seconds or 0.0}

    for _ in range(3):
        step()
    # Before the first save: what one save frees, the allocator keeps for the next.
    base = resident()
    saves = [save(number + 1) for number in range(options.saves + 1)][1:]
    size = sum(path.stat().st_size for path in options.folder.glob("global_step*/*"))
    return {"bytes": size, "saves": saves}


def flat(options: argparse.Namespace) -> dict[str, object]:
    """The configuration of the run that is measured."""
    layers, hidden, heads = SHAPES[options.shape]
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": options.tokens,
        "max_position_embeddings": options.tokens,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "no_weight_tying": True,
        "gpt_j_residual": True,
        "attention_config": [[["global"], layers]],
        "padded_vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 128,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 0},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_iters": 1000,
        "lr_decay_iters": 1000,
        "distributed_backend": "gloo",
        "global_num_gpus": 1,
        "precision": "fp32",
        "hidden_dropout": 0,
        "attention_dropout": 0,
        "data_path": "unused",
        "eval_iters": 0,
    }


def training(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Stall and memory, printed."""
    found: dict[str, object] = {}
    columns = (
        "saving",
        "stands still, ms",
        "slower later, ms (steps)",
        "a usual step, ms",
        "save, s",
        "GB/s",
        "peak memory, MB over usual",
    )
    print(f"\n| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    for mode in MODES:
        place = folder / mode.replace(" ", "_")
        arguments = ["--shape", options.shape, "--tokens", str(options.tokens), "--saves", str(options.saves), "--folder", str(place)]
        result = folder / "result.json"
        command = [sys.executable, __file__, *arguments, "--worker", mode, "--json", str(result)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
        found[mode] = figures = json.loads(result.read_text())
        size = figures["bytes"]
        middle = {key: statistics.median(save[key] for save in figures["saves"]) for key in figures["saves"][0]}
        print(
            f"| {mode} | {1e3 * middle['stands']:.0f} | {1e3 * middle['slower']:.0f} ({middle['steps']:.0f}) | {1e3 * middle['usual']:.0f} "
            f"| {middle['whole']:.2f} | {size / 1e9 / middle['whole']:.2f} | {middle['memory']:.0f} |"
        )
        print(f"{'' if mode == MODES[0] else f'{chr(10)}A checkpoint has {size / 1e6:.0f} MB.'}", end="")
    print()
    return found


def main() -> None:
    """Measure and print."""
    options = parse()
    sys.path.insert(0, str(ROOT))
    if options.worker:
        options.json.write_text(json.dumps(worker(options)))
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as temporary:
        figures = {"files": files(options, Path(temporary)), "training": training(options, Path(temporary))}
    print(f"\nLoad of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
