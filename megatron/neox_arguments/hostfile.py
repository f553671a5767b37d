# SPDX-License-Identifier: Apache-2.0
"""How many ranks a run has, read from hostfile, environment and device files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron.launch.environment import visible_devices as visible_devices

DEFAULT_HOSTFILE: Final = "/job/hostfile"


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The keys that choose hosts and devices. local: this machine only, whatever hostfile is about"""

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int = -1
    num_gpus: int | None = None
    slurm: bool = False
    local: bool = False


class HostError(ValueError):
    """A hostfile or a host filter cannot be used; (message, line or None)."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def count_ranks(hosts: Hosts, environ: Mapping[str, str], *, devices: int) -> tuple[int, str]:
    """Number of ranks and what it was read from.

    devices: CUDA devices visible on this machine, 0 without CUDA.
    Raises HostError when a named hostfile is missing or damaged or the filters leave nothing.
    """
    path = find_hostfile(hosts, environ)
    if path:
        return sum(len(numbers) for numbers in read_hosts(hosts, environ).values()), f"hostfile {path}"
    if hosts.slurm and (tasks := slurm_tasks(environ)):
        return tasks, "SLURM_NTASKS"
    if environ.get("WORLD_SIZE", "").isdigit() and int(environ["WORLD_SIZE"]) > 0:
        return int(environ["WORLD_SIZE"]), "WORLD_SIZE"
    if hosts.num_gpus is not None:
        return hosts.num_gpus, "num_gpus"
    return (devices, "visible CUDA devices") if devices else (1, "this machine, which has no CUDA device")


def find_hostfile(hosts: Hosts, environ: Mapping[str, str]) -> str | None:
    """The hostfile in use: the key, else DLTS_HOSTFILE, else the customary path if it is there."""
    if hosts.local:
        return None
    return hosts.hostfile or environ.get("DLTS_HOSTFILE") or (DEFAULT_HOSTFILE if Path(DEFAULT_HOSTFILE).is_file() else None)


def read_hosts(hosts: Hosts, environ: Mapping[str, str]) -> dict[str, list[int]]:
    """{host: slots in use} of the hostfile, which there must be. Raises HostError when it is missing or damaged, or nothing is left."""
    return filter_hosts(parse_hostfile(_read(find_hostfile(hosts, environ) or DEFAULT_HOSTFILE)), hosts)


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """Number of tasks of the SLURM job, 0 outside of one."""
    numbers = {name: int(value) for name, value in environ.items() if name.startswith("SLURM_") and value.isdigit()}
    return numbers.get("SLURM_NTASKS") or numbers.get("SLURM_NNODES", 0) * numbers.get("SLURM_NTASKS_PER_NODE", 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise HostError(f"cannot read the hostfile {path}: {error.strerror}") from error


def parse_hostfile(text: str) -> dict[str, list[int]]:
    """Lines `name slots=N` -> {name: slot numbers}.

    >>> parse_hostfile("a slots=2  # first\\n\\nb slots=1")
    {'a': [0, 1], 'b': [0]}
    """
    slots: dict[str, list[int]] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d+)", line)
        if not match:
            raise HostError(f"hostfile line {number} is {line!r}, not `name slots=N`", number)
        if match[1] in slots:
            raise HostError(f"hostfile line {number} names host {match[1]} a second time", number)
        slots[match[1]] = list(range(int(match[2])))
    if not any(slots.values()):
        raise HostError("the hostfile names no slot")
    return slots


def parse_filter(text: str) -> dict[str, list[int] | None]:
    """`host1@host2:0,2` -> {host: chosen slots, None for all}.

    >>> parse_filter("a@b:0,2")
    {'a': None, 'b': [0, 2]}
    """
    chosen: dict[str, list[int] | None] = {}
    for part in text.split("@"):
        name, _, numbers = part.strip().partition(":")
        if not name or (numbers and not re.fullmatch(r"\d+(,\d+)*", numbers)):
            raise HostError(f"{part.strip()!r} is not `host` or `host:slot,slot`")
        chosen[name] = [int(number) for number in numbers.split(",")] if numbers else None
    return chosen


def filter_hosts(slots: Mapping[str, list[int]], hosts: Hosts) -> dict[str, list[int]]:
    """The slots that include or exclude, num_nodes and num_gpus leave, hosts in the order of the hostfile."""
    kept = {name: list(numbers) for name, numbers in slots.items()}
    for text in (hosts.include, hosts.exclude):
        for name, numbers in parse_filter(text).items() if text else ():
            missing = set(numbers or ()) - set(slots.get(name, ()))
            if name not in slots or missing:
                raise HostError(f"the hostfile has no host {name}" if name not in slots else f"host {name} has no slot {min(missing)}")
    if hosts.include:
        wanted = parse_filter(hosts.include)
        kept = {name: list(wanted[name] or numbers) for name, numbers in kept.items() if name in wanted}
    elif hosts.exclude:
        unwanted = parse_filter(hosts.exclude)
        kept = {name: _without(name, numbers, unwanted) for name, numbers in kept.items()}
    kept = {name: numbers for name, numbers in kept.items() if numbers}
    if hosts.num_nodes > 0:
        if hosts.num_nodes > len(kept):
            raise HostError(f"num_nodes is {hosts.num_nodes}, but the hostfile leaves {len(kept)} hosts")
        kept = dict(list(kept.items())[: hosts.num_nodes])
    # As the launcher does, a filter that names slots wins over num_gpus.
    if hosts.num_gpus and not (hosts.include or hosts.exclude):
        kept = {name: numbers[: hosts.num_gpus] for name, numbers in kept.items()}
    if not kept:
        raise HostError("include, exclude and num_nodes leave no slot of the hostfile")
    return kept


def _without(name: str, numbers: list[int], unwanted: Mapping[str, list[int] | None]) -> list[int]:
    if name not in unwanted:
        return numbers
    gone = unwanted[name]
    return [] if gone is None else [number for number in numbers if number not in gone]
