# SPDX-License-Identifier: Apache-2.0
"""Environment variables of the ranks: which go to other machines, what each rank is told, and which rank this process is."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
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
PRIVATE = tuple(
    "CUDA_VISIBLE_DEVICES NEOX_FAILURE_FILE NEOX_FAILURE_FILE_OF NEOX_LAUNCH_FOLDER NEOX_LAUNCH_WIRE NEOX_LAUNCH_SECRET"
    " NEOX_LAUNCH_END".split()
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
    return dict(pair for path in paths if path.is_file() for pair in _lines(path))


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


LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 20000, 20000
# More hosts than any cluster has: a range such as [1-999999999] is a mistake, and must not fill the memory.
MOST_HOSTS = 100_000
# nid[001-003,007] or a plain name: one entry of a node list
PART = r"(?:[^,\[\]\s]|\[[^\[\]]*\])+"


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """One rank's place: its number in the run and on its host, the sizes of both, where all meet, and its host's number.

    master_port: None where nothing says it
    local_size, node, nodes: filled in by whoever starts the rank
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_size: int = 1
    master_addr: str = LOOPBACK
    master_port: int | None = None
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


# How each kind of start names rank, local rank, world size and the ranks on this host. mpirun inside a SLURM job starts its
# helpers with srun, so SLURM's names come last.
TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
MPICH = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
# A batch script has SLURM_PROCID=0 too, but only a process started by srun belongs to a step with tasks.
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
SLURM_JOB = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE")


def place_from(environ: Mapping[str, str], *, slurm: bool = False, mpi: bool = False) -> Rendezvous:
    """Rank, local rank, world size and meeting point; a lone process where nothing is set.

    slurm, mpi: the configuration says (`deepspeed_slurm`, `deepspeed_mpi`) that ranks come from there, so these are looked at first
    and must be set, unless a launcher has translated them into RANK and its companions.
    Raises ConfigError when they are not set, are no numbers, or when several hosts have no common address.
    """
    order = [TORCH, OPENMPI, MPICH, SLURM]
    if slurm:
        order.insert(0, SLURM_JOB)
    if mpi:
        order[:0] = [OPENMPI, MPICH]
    names = next((names for names in order if all(name in environ for name in names[:3])), None)
    if names is None:
        if slurm or mpi:
            key, wanted = ("deepspeed_slurm", SLURM_JOB) if slurm else ("deepspeed_mpi", OPENMPI)
            raise ConfigError(
                f"{key} is true, but {', '.join(wanted[:3])} are not set", where=key, fix="start through srun / mpirun, or unset the key"
            )
        return Rendezvous()
    rank, local_rank, world_size = (_number(environ, name) for name in names[:3])
    return Rendezvous(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        master_addr=_address(environ, names, world_size),
        master_port=_port(environ, names, world_size),
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name} is {environ[name]!r}, not a number", where=name, fix="unset it, or start with a launcher") from None


def _address(environ: Mapping[str, str], names: tuple[str, ...], world_size: int) -> str:
    """MASTER_ADDR, else the first host of a SLURM step, else this machine if all ranks are on it."""
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if names in (SLURM, SLURM_JOB) and hosts:
        return expand(hosts)[0]
    here = environ.get(names[3], "")
    if names != TORCH and here.isdecimal() and int(here) < world_size:
        raise ConfigError(
            f"{world_size} ranks on several hosts have no common address", where="MASTER_ADDR", fix="export MASTER_ADDR=<host of rank 0>"
        )
    return LOOPBACK


def _port(environ: Mapping[str, str], names: tuple[str, ...], world_size: int) -> int | None:
    """MASTER_PORT, else one that all ranks of the same start derive from the same number; None if there is no such number."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    if names in (SLURM, SLURM_JOB) and environ.get("SLURM_JOB_ID", "").isdecimal():
        return slurm_port(environ)
    if names in (OPENMPI, MPICH) and environ.get(names[3]) == environ[names[2]] and world_size > 1:
        # All on this machine: children of one process.
        return FIRST_PORT + os.getppid() % PORTS
    return None


def slurm_port(environ: Mapping[str, str]) -> int:
    """A port that belongs to this SLURM job and step: two jobs on one host do not meet. SLURM_JOB_ID must be set."""
    step = environ.get("SLURM_STEP_ID", "")
    return FIRST_PORT + (int(environ["SLURM_JOB_ID"]) + int(step if step.isdecimal() else 0)) % PORTS


def expand(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list, in its order. Raises ConfigError for a damaged one.

    >>> expand("nid[001-003,007],login1")
    ['nid001', 'nid002', 'nid003', 'nid007', 'login1']
    >>> expand("r[1-2]n[08-09]")
    ['r1n08', 'r1n09', 'r2n08', 'r2n09']
    """
    hosts: list[str] = []
    try:
        if not re.fullmatch(rf"{PART}(,{PART})*", nodelist.strip()):
            raise ValueError(nodelist)
        for part in re.findall(PART, nodelist.strip()):
            pieces = [[text] if text else _choices(choices) for text, choices in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part)]
            if math.prod(map(len, pieces)) > MOST_HOSTS:
                raise ValueError(part)
            hosts += map("".join, product(*pieces))
    except ValueError:
        raise ConfigError(
            f"{nodelist!r} is not a SLURM node list", where="SLURM_JOB_NODELIST", fix="export MASTER_ADDR=<host of rank 0> to do without it"
        ) from None
    return hosts


def _choices(text: str) -> list[str]:
    """001-003,007 -> 001 002 003 007"""
    found: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not match or not 0 <= last - first < MOST_HOSTS:
            raise ValueError(item)
        found += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return found
