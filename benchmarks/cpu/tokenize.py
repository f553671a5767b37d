# SPDX-License-Identifier: Apache-2.0
"""preprocess_data.py against a bare loop over `tokenizers.encode_batch_fast` with a minimal writer: whole processes, in turn.

    python benchmarks/cpu/tokenize.py --rounds 3

The corpus is Python source: the standard library, then installed packages, one document per file up to 1 MB, no file twice (the
libraries keep what they have seen, and a corpus that repeats itself would flatter them). The tokenizer is a byte-level BPE of 50,277
ids trained on a part of it. Printed per side: wall and CPU seconds, MB/s, peak memory (all processes, shared pages once), and the
median of the per-round ratios to the bare loop. All sides must write the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, whose tokenize.py would hide the standard one
TOOL = ROOT / "tools" / "datasets" / "preprocess_data.py"
VOCAB = 50277
TRAIN_MB = 20
MOST_BYTES = 1_000_000
BARE_BATCH = 1 << 20

BARE = """
import json, struct, sys
import numpy as np
from tokenizers import Tokenizer

source, vocab, prefix = sys.argv[1:]
tokenizer = Tokenizer.from_file(vocab)
eod = tokenizer.token_to_id("<|endoftext|>")
sizes = []
with open(source, "rb") as lines, open(prefix + "_text_document.bin", "wb") as out:
    def flush(texts):
        for encoding in tokenizer.encode_batch_fast(texts):
            if encoding.ids:
                ids = np.array(encoding.ids + [eod], np.uint16)
                sizes.append(len(ids))
                out.write(ids.tobytes())
    texts, held = [], 0
    for line in lines:
        texts.append(json.loads(line)["text"])
        held += len(line)
        if held > BATCH:
            flush(texts)
            texts, held = [], 0
    flush(texts)
sizes = np.array(sizes, np.int32)
with open(prefix + "_text_document.idx", "wb") as out:
    out.write(struct.pack("<9sQBQQ", b"MMIDIDX\\0\\0", 1, 8, len(sizes), len(sizes) + 1))
    out.write(sizes.tobytes())
    out.write(((np.cumsum(sizes, dtype=np.int64) - sizes) * 2).tobytes())
    out.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
""".replace("BATCH", str(BARE_BATCH))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=104, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of preprocess_data.py, one side for each")
    parser.add_argument("--backends", nargs="+", default=["hf", "gigatoken"])
    parser.add_argument("--folder", type=Path, help="keep corpus and tokenizer here and use them again")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


def sources() -> Iterator[str]:
    """Texts of Python files: the standard library first."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    seen: set[bytes] = set()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if root is roots[0] and "site-packages" in path.parts:
                continue
            content = path.read_bytes()
            if len(content) > MOST_BYTES:
                continue
            digest = hashlib.sha256(content).digest()
            if digest not in seen:
                seen.add(digest)
                yield content.decode("utf-8", errors="replace")


def prepare(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """Corpus and tokenizer."""
    corpus, vocab = folder / f"corpus-{megabytes}.jsonl", folder / "tokenizer.json"
    if not corpus.exists():
        with corpus.open("w", encoding="utf-8") as out:
            size = 0
            for text in sources():
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                out.write(line)
                size += len(line.encode())
                if size > megabytes * 1_000_000:
                    break
    if not vocab.exists():
        from megatron.tokenizer.train import save_tokenizer, train_bpe

        def some() -> Iterator[str]:
            size = 0
            for text in sources():
                size += len(text)
                if size > TRAIN_MB * 1_000_000:
                    return
                yield text

        save_tokenizer(train_bpe(some(), vocab_size=VOCAB), vocab)
    return corpus, vocab


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found, parents = [pid], {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def memory(pid: int) -> int:
    """Kilobytes of a process and all below it, shared pages counted once."""
    total = 0
    for one in family(pid):
        try:
            total += int(
                next(line for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")).split()[1]
            )
        except (OSError, StopIteration):
            continue
    return total


def measure(command: list[str]) -> dict[str, float]:
    """Run it: wall seconds, CPU seconds of all its processes, peak memory in MB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    wall = time.monotonic() - started
    over.set()
    watcher.join()
    if status:
        raise SystemExit(f"{command} ended with {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "peak_mb": peak[0] / 1024}


def main() -> None:
    """Measure in turn, compare the bytes, print."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        corpus, vocab = prepare(folder, options.megabytes)
        sides = {"bare encode_batch_fast": [sys.executable, "-c", BARE, str(corpus), str(vocab), f"{scratch}/bare"]}
        for backend in options.backends:
            for workers in options.workers:
                name = f"preprocess_data {backend}, {workers} worker{'s' * (workers > 1)}"
                given = ["--input", corpus, "--vocab-file", vocab, "--tokenizer-type", "HFTokenizer", "--append-eod"]
                given += ["--tokenizer-backend", backend, "--workers", workers, "--output-prefix", f"{scratch}/{backend}{workers}"]
                sides[name] = [sys.executable, str(TOOL), *map(str, given)]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for round_number in range(options.rounds):
            order = list(sides)[:: 1 if round_number % 2 == 0 else -1]
            for name in order:
                runs[name].append(measure(sides[name]))
                print(f"round {round_number + 1}: {name}: {runs[name][-1]['wall_s']:.1f} s", flush=True)
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(scratch).glob("*_text_document.bin")}
        indexes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(scratch).glob("*_text_document.idx")}
        report(runs, corpus.stat().st_size / 1e6)
        print(f"same bytes on all sides: {len(digests) == 1 and len(indexes) == 1}")
        if options.json:
            options.json.write_text(json.dumps(runs, indent=1))


def report(runs: dict[str, list[dict[str, float]]], megabytes: float) -> None:
    """The table."""
    bare = next(iter(runs.values()))
    print(f"\n{megabytes:.1f} MB of JSON lines, {len(bare)} rounds")
    print("| side | wall s (median) | MB/s | CPU s | peak MB | speed : bare loop |\n|---|---|---|---|---|---|")
    for name, mine in runs.items():
        wall, cpu = (statistics.median(run[key] for run in mine) for key in ("wall_s", "cpu_s"))
        ratio = statistics.median(other["wall_s"] / run["wall_s"] for run, other in zip(mine, bare, strict=True))
        print(f"| {name} | {wall:.2f} | {megabytes / wall:.1f} | {cpu:.2f} | {max(run['peak_mb'] for run in mine):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
