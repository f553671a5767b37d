# SPDX-License-Identifier: Apache-2.0
"""How many ranks a run has, and on which hosts of a hostfile or devices of this machine."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron.errors import ConfigError
from megatron.launch import commands
from megatron.launch.commands import Host
from megatron.launch.environment import LOOPBACK, visible_devices

from .sections.run import RuntimeArgs

DEFAULT_HOSTFILE: Final = "/job/hostfile"
LOCAL_NAMES: Final = ("localhost", LOOPBACK)


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

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Hosts:
        """As keys of the configuration say."""
        names = ("hostfile", "include", "exclude", "num_nodes", "num_gpus")
        slurm = keys["deepspeed_slurm"] or keys["launcher"] == "slurm"
        return cls(**{name: keys[name] for name in names}, slurm=slurm, local=keys["launcher"] == "local")


class HostError(ValueError):
    """A hostfile or a host filter cannot be used."""


# The hostfile


def count_ranks(hosts: Hosts, environ: Mapping[str, str], *, devices: int) -> tuple[int, str]:
    """Number of ranks and what it was read from.

    devices: CUDA devices visible on this machine, 0 without CUDA.
    Raises HostError when a named hostfile is missing or damaged or the filters leave nothing.
    """
    path = find_hostfile(hosts, environ)
    if path:
        return sum(len(numbers) for numbers in read_hosts(path, hosts).values()), f"hostfile {path}"
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


def read_hosts(path: str, hosts: Hosts) -> dict[str, list[int]]:
    """{host: slots in use} of a hostfile. Raises HostError when it is missing or damaged, or nothing is left."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise HostError(f"cannot read the hostfile {path}: {error.strerror}") from error
    return filter_hosts(parse_hostfile(text), hosts)


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """Number of tasks of the SLURM job, 0 outside of one."""
    numbers = {name: int(value) for name, value in environ.items() if name.startswith("SLURM_") and value.isdigit()}
    return numbers.get("SLURM_NTASKS") or numbers.get("SLURM_NNODES", 0) * numbers.get("SLURM_NTASKS_PER_NODE", 0)


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
            raise HostError(f"hostfile line {number} is {line!r}, not `name slots=N`")
        if match[1] in slots:
            raise HostError(f"hostfile line {number} names host {match[1]} a second time")
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
    wanted, unwanted = (parse_filter(text) if text else {} for text in (hosts.include, hosts.exclude))
    for name, numbers in (*wanted.items(), *unwanted.items()):
        if name not in slots:
            raise HostError(f"the hostfile has no host {name}")
        if missing := set(numbers or ()) - set(slots[name]):
            raise HostError(f"host {name} has no slot {min(missing)}")
    kept = dict(slots)
    if wanted:
        kept = {name: list(wanted[name] or numbers) for name, numbers in kept.items() if name in wanted}
    for name, dropped in unwanted.items() if not wanted else ():
        kept[name] = [] if dropped is None else [number for number in kept[name] if number not in dropped]
    kept = {name: numbers for name, numbers in kept.items() if numbers}
    if hosts.num_nodes > 0:
        if hosts.num_nodes > len(kept):
            raise HostError(f"num_nodes is {hosts.num_nodes}, but the hostfile leaves {len(kept)} hosts")
        kept = dict(list(kept.items())[: hosts.num_nodes])
    # As the launcher does, a filter that names slots wins over num_gpus.
    if hosts.num_gpus and not (wanted or unwanted):
        kept = {name: numbers[: hosts.num_gpus] for name, numbers in kept.items()}
    if not kept:
        raise HostError("include, exclude and num_nodes leave no slot of the hostfile")
    return kept


# The ranks of a run


def chosen_hosts(runtime: RuntimeArgs, environ: Mapping[str, str]) -> tuple[Host, ...]:
    """The hosts of the hostfile that the filters leave, in the order of ranks; empty without a hostfile."""
    choice, wanted = Hosts.of(vars(runtime)), runtime.global_num_gpus
    path = find_hostfile(choice, environ)
    if path is None:
        return ()
    try:
        slots = read_hosts(path, choice)
    except HostError as error:
        raise ConfigError(str(error), where="hostfile", fix="name an existing hostfile and hosts of it, or none for this machine") from None
    hosts: list[Host] = []
    total = 0
    for name, numbers in slots.items():
        hosts.append(Host(name=name, slots=tuple(numbers), first=total))
        total += len(numbers)
    commands.check_names(hosts)
    if total != (wanted or total):
        raise ConfigError(
            f"the hostfile and its filters give {total} ranks, but global_num_gpus is {wanted}",
            where="global_num_gpus, hostfile",
            fix="leave global_num_gpus out, or choose hosts with include, num_nodes or num_gpus",
        )
    return tuple(hosts)


def is_here(name: str) -> bool:
    """Whether a host name is this machine: its own name, or one of an address that this machine has."""
    if name in LOCAL_NAMES or name == socket.gethostname():
        return True
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)  # only an own address can be bound
            return True
        except OSError:
            continue
    return False


def this_machine(runtime: RuntimeArgs, environ: Mapping[str, str]) -> Host:
    """This machine with the devices that its ranks get; without CUDA their numbers only count the ranks."""
    count, on_cuda = runtime.global_num_gpus or 1, cuda_devices(environ)
    if runtime.num_nodes > 1:
        raise ConfigError(
            f"num_nodes is {runtime.num_nodes}, but there is no hostfile", where="num_nodes", fix="set hostfile, or drop num_nodes"
        )
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    pool: list[int | str] = list(range(on_cuda or count))
    if on_cuda and visible:
        pool = [int(name) if name.isdecimal() else name for name in visible][:on_cuda]
    if runtime.include:
        pool = _slots(runtime.include, "include") or pool
    elif runtime.exclude:
        dropped = _slots(runtime.exclude, "exclude")
        pool = [device for device in pool if device not in dropped]
    if len(pool) < count:
        raise ConfigError(
            f"{count} ranks are wanted on this machine, but only {len(pool)} devices can be used",
            where="global_num_gpus",
            fix=f"set global_num_gpus to at most {len(pool)}, give a hostfile, or set DS_ACCELERATOR=cpu to run on CPU",
        )
    return Host(name="localhost", slots=tuple(pool[:count]), first=0)


def cuda_devices(environ: Mapping[str, str]) -> int:
    """CUDA devices of this machine that ranks may use; 0 where they run on CPU."""
    return visible_devices(environ) if environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0


def _slots(text: str, key: str) -> list[int | str]:
    """[1, 3] of `localhost:1,3`; empty when only the host is named."""
    fix = "write localhost:0,1, or give a hostfile"
    try:
        hosts = parse_filter(text)
    except HostError as error:
        raise ConfigError(str(error), where=key, fix=fix) from None
    if len(hosts) != 1 or not set(hosts) <= {*LOCAL_NAMES, socket.gethostname()}:
        raise ConfigError(f"{key}: {text!r} is not about this machine, and there is no hostfile", where=key, fix=fix)
    (slots,) = hosts.values()
    return list(slots or ())
