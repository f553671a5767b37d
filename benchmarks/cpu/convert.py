# SPDX-License-Identifier: Apache-2.0
"""What a conversion costs, to Hugging Face files and back, beside a plain copy of the same bytes.

    python benchmarks/cpu/convert.py --params 1000000000 --rounds 1

The checkpoint is of random numbers, bfloat16. Each conversion is a process of its own, without --verify (which compares models, not files).
Measured: seconds of the conversion without imports, seconds of the process, and the peak of the anonymous memory beyond what it was after
the imports; the copy is read and written in pieces and flushed to disk, as the conversion's files are. Targets: 1.5 x the copy;
1.5 x the largest layer + 300 MB.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, whose tokenize.py would hide the standard one

VOCAB = 50304
PIECE = 8 << 20


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=200_000_000, help="about so many parameters")
    parser.add_argument("--family", choices=("neox", "llama"), default="neox")
    parser.add_argument("--tp", type=int, default=1, help="tensor ranks of the checkpoint")
    parser.add_argument("--pp", type=int, default=1, help="stages of the checkpoint, 0 = one file per tensor rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made (4 x 2 bytes a parameter); default a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def hf_fields(params: int, family: str) -> dict[str, Any]:
    """A config.json with about so many parameters."""
    layers = 16
    per_layer = 12 if family == "neox" else 4 + 3 * 3
    hidden = max(64, round(((params / (layers * per_layer)) ** 0.5) / 64) * 64)
    while 2 * VOCAB * hidden + layers * per_layer * hidden**2 > params and hidden > 64:
        hidden -= 64
    common = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "vocab_size": VOCAB}
    common |= {"max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    if family == "neox":
        own = {"intermediate_size": 4 * hidden, "rotary_pct": 0.25, "hidden_act": "gelu"}
        return {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **common, **own}
    own = {"intermediate_size": 3 * hidden, "num_key_value_heads": hidden // 64, "hidden_act": "silu", "rms_norm_eps": 1e-6}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common, **own}


def make_model(folder: Path, fields: dict[str, Any]) -> tuple[int, int]:
    """Random safetensors, a tensor at a time; returns bytes in all, and of the largest layer."""
    import torch

    from megatron.checkpoint.conversion.convert import planned
    from megatron.checkpoint.conversion.model import Described
    from megatron.checkpoint.conversion.output_folder import content_of
    from megatron.checkpoint.formats.hf_files import write_json, write_shards
    from megatron.checkpoint.loading.merge_tp import shapes_of
    from megatron.checkpoint.mapping.families import family_of, neox_keys
    from megatron.checkpoint.mapping.rows import bound_rows
    from megatron.model.build_spec import build_spec
    from megatron.neox_arguments import NeoXArgs

    family = family_of(fields)
    keys = {"train_iters": 1, "train_micro_batch_size_per_gpu": 1, "global_num_gpus": 1, **neox_keys(family, fields)}
    spec = build_spec(NeoXArgs.from_dict(keys))
    shapes = shapes_of(spec)
    plan = planned(list(bound_rows(family, spec, VOCAB)), Described({}, spec), dict.fromkeys(shapes, torch.bfloat16), None)
    folder.mkdir()
    write_json(folder / "config.json", fields)
    tensors = ((one.name, torch.randn(one.shape).mul_(0.02).bfloat16()) for one in plan)
    write_shards(folder, plan, tensors, lambda name, tensor: content_of(tensor), limit=10**9)
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        slot = name.partition(".")[0]
        layers[slot] = layers.get(slot, 0) + torch.Size(shape).numel() * 2
    return sum(one.bytes for one in plan), max(layers.values())


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def watched(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and the peak of the anonymous memory beyond where it began."""
    peak, over = [anonymous()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    begun_at, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start()
    begun = time.monotonic()
    work()
    spent = time.monotonic() - begun
    over.set()
    watcher.join()
    return {"seconds": spent, "anonymous_mb": (peak[0] - begun_at) / 1e6, "begun_mb": begun_at / 1e6}


def work(kind: str, source: Path, out: Path, given: argparse.Namespace) -> dict[str, float]:
    """One conversion in this process, or a copy."""
    if kind == "copy":
        return watched(lambda: copy(source, out))
    import torch._dynamo  # noqa: F401  what writing imports

    from megatron.checkpoint.conversion.build import to_hf, to_neox
    from megatron.checkpoint.conversion.model import ToHF, ToNeoX

    if kind == "to_hf":
        return watched(lambda: to_hf(ToHF(source=source, out=out, verify=False, overwrite=True)))
    return watched(lambda: to_neox(ToNeoX(source=source, out=out, verify=False, overwrite=True, tensor=given.tp, pipe=given.pp)))


def copy(source: Path, out: Path) -> None:
    """All files of a folder, flushed to disk."""
    shutil.rmtree(out, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as read, target.open("wb") as write:
                shutil.copyfileobj(read, write, PIECE)
                write.flush()
                os.fsync(write.fileno())


def measure(kind: str, source: Path, out: Path, given: argparse.Namespace) -> dict[str, float]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--worker", kind, str(source), str(out), "--tp", str(given.tp), "--pp", str(given.pp)]
    begun = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.monotonic() - begun
    shutil.rmtree(out, ignore_errors=True) if kind == "copy" else None
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**figures, "process_seconds": whole}


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    given = parse(argv)
    if given.worker:
        kind, source, out = given.worker
        print(json.dumps(work(kind, Path(source), Path(out), given)))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        total, layer = make_model(folder / "hf", hf_fields(given.params, given.family))
        print(f"{given.family}, {total / 2e9:.3f} billion parameters, {total / 1e9:.2f} GB, largest layer {layer / 1e6:.0f} MB")
        rounds: dict[str, list[dict[str, float]]] = {"copy": [], "to_neox": [], "to_hf": []}
        for _ in range(given.rounds):
            rounds["copy"].append(measure("copy", folder / "hf", folder / "copied", given))
            rounds["to_neox"].append(measure("to_neox", folder / "hf", folder / "neox", given))
            rounds["to_hf"].append(measure("to_hf", folder / "neox", folder / "back", given))
    middle = {kind: {name: statistics.median(one[name] for one in every) for name in every[0]} for kind, every in rounds.items()}
    for kind, figures in middle.items():
        times = figures["seconds"] / middle["copy"]["seconds"]
        print(
            f"{kind:8s} {figures['seconds']:6.2f} s ({times:.2f} x the copy), process {figures['process_seconds']:6.2f} s, "
            f"peak +{figures['anonymous_mb']:.0f} MB anonymous (from {figures['begun_mb']:.0f} MB)"
        )
    print(f"targets: 1.5 x the copy; {1.5 * layer / 1e6 + 300:.0f} MB anonymous")
    if given.json:
        given.json.write_text(json.dumps({"bytes": total, "largest_layer": layer, **middle}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
