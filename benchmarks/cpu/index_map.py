# SPDX-License-Identifier: Apache-2.0
"""What the index map of a large corpus costs: building it, the memory it holds, the first sample and random samples.

    python benchmarks/cpu/index_map.py --documents 10000000 --rounds 3

The corpus is documents of random length; its token file is a hole of the right size (all zeros), so that no disk is measured. Each round
is a process of its own. Printed: the median of each figure and its range.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, whose tokenize.py would hide the standard one

import numpy as np  # noqa: E402

FIGURES = {
    "import_s": "import, wall s",
    "open_s": "open the dataset, wall s",
    "build_s": "build, wall s",
    "build_cpu_s": "build, CPU s",
    "rss_before_mb": "RSS before the build, MB",
    "rss_after_mb": "RSS after the build, MB",
    "rss_peak_mb": "peak RSS, MB",
    "first_ms": "first sample, ms",
    "samples_per_s": "random samples / CPU s, warm",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--mean", type=int, default=300, help="tokens of a document")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=20_000, help="random samples read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the corpus is made (12 bytes a document on disk); default a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_corpus(prefix: Path, documents: int, mean: int) -> int:
    """An index of documents of random length and a token file of holes; the number of tokens."""
    from megatron.data.indexed_dataset import HEADER, MAGIC, VERSION, data_file, index_file

    sizes = np.maximum(np.random.default_rng(0).exponential(mean, documents), 1).astype(np.int32)
    ends = np.cumsum(sizes, dtype=np.int64) * 2
    with index_file(prefix).open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        for part in (sizes, ends - 2 * sizes.astype(np.int64), np.arange(documents + 1, dtype=np.int64)):
            file.write(part.data)
    with data_file(prefix).open("wb") as file:
        file.truncate(int(ends[-1]))
    return int(ends[-1]) // 2


def rss_mb() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(prefix: Path, seq_length: int, samples: int) -> dict[str, float]:
    """One round, in this process."""
    began = time.perf_counter()
    from megatron.data.index_map import packed
    from megatron.data.indexed_dataset import IndexedDataset
    from megatron.data.streams import StreamDataset

    figures = {"import_s": time.perf_counter() - began}
    began = time.perf_counter()
    dataset = IndexedDataset(prefix)
    dataset.sizes.sum(dtype=np.int64)
    figures["open_s"] = time.perf_counter() - began
    figures["rss_before_mb"] = rss_mb()
    began, cpu = time.perf_counter(), time.process_time()
    index = packed(dataset.sizes, (0, len(dataset)), seq_length, seed=1234)
    figures["build_s"], figures["build_cpu_s"] = time.perf_counter() - began, time.process_time() - cpu
    figures["rss_after_mb"] = rss_mb()
    figures["rss_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = StreamDataset({"text": dataset}, index, seq_length)
    began = time.perf_counter()
    first = rows[0]["text"]
    figures["first_ms"] = (time.perf_counter() - began) * 1e3
    if first.shape != (seq_length + 1,):
        raise SystemExit(f"a sample of {first.shape} values")
    picks = np.random.default_rng(1).integers(0, len(rows), samples).tolist()
    # The first pass brings in the pages: a hole's are made by the kernel, which is not what a disk does.
    for _ in range(2):
        cpu = time.process_time()
        for pick in picks:
            _item = rows[pick]
    figures["samples_per_s"] = samples / (time.process_time() - cpu)
    return figures


def main(argv: list[str] | None = None) -> int:
    """Make the corpus, run the rounds, print the table."""
    options = parse(argv)
    if options.worker:
        print(json.dumps(measure(Path(options.worker), options.seq_length, options.samples)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix = Path(folder) / "corpus"
        tokens = make_corpus(prefix, options.documents, options.mean)
        command = [sys.executable, __file__, "--worker", str(prefix), "--seq-length", str(options.seq_length)]
        command += ["--samples", str(options.samples)]
        rounds = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(options.rounds)]
    print(f"{options.documents} documents, {tokens} tokens, rows of {options.seq_length}, {options.rounds} rounds")
    print(f"| {'figure':<28} | {'median':>9} | {'range':>19} |\n|{'-' * 30}|{'-' * 11}|{'-' * 21}|")
    for key, title in FIGURES.items():
        values = [figures[key] for figures in rounds]
        print(f"| {title:<28} | {statistics.median(values):>9.5g} | {f'{min(values):.5g} to {max(values):.5g}':>19} |")
    if options.json:
        options.json.write_text(
            json.dumps({"documents": options.documents, "tokens": tokens, "rounds": rounds}, indent=1), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
