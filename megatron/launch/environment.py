# SPDX-License-Identifier: Apache-2.0
"""Environment variables of the ranks: which go to other machines, what each rank is told, and which are secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError

# What ranks on other machines need to find the same programs and libraries and to behave the same way; folders and names
# that belong to one machine (HOME, TMPDIR, HOSTNAME, DISPLAY) stay there, and so do the ranks of an outer job.
NAMES = frozenset("PATH LD_LIBRARY_PATH LD_PRELOAD LOGLEVEL TOKENIZERS_PARALLELISM XDG_CACHE_HOME CC CXX MAX_JOBS".split())
PREFIXES = tuple(
    "AWS_ COMET_ CUBLAS_ CUDA_ CUDNN_ DS_ FI_ GLOO_ GOMP_ HF_ HUGGING KMP_ MKL_ MLFLOW MV2 NCCL NEOX_ NVIDIA_ NVTE_ OMP_ OPENBLAS_"
    " PYTHON PYTORCH_ S3_ TENSORBOARD TORCH TRANSFORMERS_ TRITON_ UCX WANDB_".split()
)
# Devices are numbered per machine, and the launcher's own notes are for one process.
PRIVATE = (
    "CUDA_VISIBLE_DEVICES",
    "NEOX_FAILURE_FILE",
    "NEOX_FAILURE_FILE_OF",
    "NEOX_LAUNCH_FOLDER",
    "NEOX_LAUNCH_WIRE",
    "NEOX_LAUNCH_SECRET",
    "NEOX_LAUNCH_END",
)
DEEPSPEED_ENV = ".deepspeed_env"


def handed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of this machine's environment that ranks on other machines get, in alphabetical order."""
    return {name: environ[name] for name in sorted(environ) if (name in NAMES or name.startswith(PREFIXES)) and name not in PRIVATE}


def environment_file(environ: Mapping[str, str], home: Path, here: Path) -> dict[str, str]:
    """Variables for all ranks, one NAME=VALUE a line, from the file DS_ENV_FILE names, else from .deepspeed_env in `home` and `here`.

    Raises ConfigError for a line that is none, and when DS_ENV_FILE names no file.
    """
    named = environ.get("DS_ENV_FILE")
    paths = [Path(named)] if named else [folder / DEEPSPEED_ENV for folder in dict.fromkeys((home, here))]
    if named and not paths[0].is_file():
        raise ConfigError(f"DS_ENV_FILE names {named}, which does not exist", where="DS_ENV_FILE", fix="name a file, or unset it")
    found: dict[str, str] = {}
    for path in paths:
        if path.is_file():
            found |= dict(_lines(path))
    return found


def _lines(path: Path) -> Iterable[tuple[str, str]]:
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = raw.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            raise ConfigError("an environment file has a line that is not NAME=VALUE", where=f"{path}:{number}", fix="write NAME=VALUE")
        yield name.strip(), value.strip()


def visible_devices(environ: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """CUDA devices of this machine that CUDA_VISIBLE_DEVICES lets through, counted by their device files."""
    try:
        found = sum(1 for item in dev.iterdir() if re.fullmatch(r"nvidia\d+", item.name))
    except OSError:
        found = 0
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return found
    names = [name.strip() for name in chosen.split(",")]
    valid = names[: next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))]
    # MIG slices may outnumber the device files.
    return len(valid) if any(name.startswith("MIG") for name in valid) else min(len(valid), found)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One rank's place: its number in the run and on its host, the sizes of both, where all meet, and its host's number."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    master_addr: str
    master_port: int
    node: int = 0
    nodes: int = 1

    def environment(self) -> dict[str, str]:
        """As torch and DeepSpeed read it."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "LOCAL_SIZE": str(self.local_size),
            "CROSS_RANK": str(self.node),
            "CROSS_SIZE": str(self.nodes),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def machine_environment(environ: Mapping[str, str], ranks: int) -> dict[str, str]:
    """What follows from this machine, where it is not set: threads for each of `ranks` ranks, and that there is no CUDA device."""
    found: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in environ:
        found["OMP_NUM_THREADS"] = environ.get("SLURM_CPUS_PER_TASK", "") or str(max(1, cores() // max(1, ranks)))
    if environ.get("DS_ACCELERATOR", "cpu") == "cpu" and not visible_devices(environ):
        found["DS_ACCELERATOR"] = "cpu"
    return found


def python_path(environ: Mapping[str, str]) -> str:
    """The project's folder behind what is there: scripts outside of it find the package too."""
    root = str(project_folder())
    return os.pathsep.join([path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root] + [root])


def project_folder() -> Path:
    """The folder that holds the package."""
    return Path(__file__).resolve().parents[2]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
