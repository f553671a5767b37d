# SPDX-License-Identifier: Apache-2.0
"""Which rank this process is and where all meet, read from the environment that torchrun, deepy.py, srun or mpirun sets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.errors import ConfigError

LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 20000, 20000
# More hosts than any cluster has: a range such as [1-999999999] is a mistake, and must not fill the memory.
MOST_HOSTS = 100_000
# nid[001-003,007] or a plain name: one entry of a node list
PART = r"(?:[^,\[\]\s]|\[[^\[\]]*\])+"


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """This process's rank in the job, and the address where all ranks meet."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_addr: str = LOOPBACK
    master_port: int | None = None


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
    if not re.fullmatch(rf"{PART}(,{PART})*", nodelist.strip()):
        raise _damaged(nodelist)
    hosts: list[str] = []
    for part in re.findall(PART, nodelist.strip()):
        names = [""]
        for text, choices in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            tails = [text] if text else list(_choices(choices, nodelist))
            if len(names) * len(tails) > MOST_HOSTS:
                raise _damaged(nodelist)
            names = [name + tail for name in names for tail in tails]
        hosts += names
    return hosts


def _choices(text: str, nodelist: str) -> list[str]:
    """001-003,007 -> 001 002 003 007"""
    found: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if not match:
            raise _damaged(nodelist)
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MOST_HOSTS:
            raise _damaged(nodelist)
        found += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return found


def _damaged(nodelist: str) -> ConfigError:
    return ConfigError(
        f"{nodelist!r} is not a SLURM node list", where="SLURM_JOB_NODELIST", fix="export MASTER_ADDR=<host of rank 0> to do without it"
    )
