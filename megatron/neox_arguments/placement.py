# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of a run will be: hosts of the hostfile or devices of this machine, and the port where they meet."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from megatron.errors import ConfigError
from megatron.launch import commands
from megatron.launch.commands import Host
from megatron.launch.environment import LOOPBACK, slurm_port, visible_devices

from .hostfile import HostError, Hosts, find_hostfile, parse_filter, read_hosts
from .neox_args import NeoXArgs

LOCAL_NAMES = ("localhost", LOOPBACK)


def chosen_hosts(args: NeoXArgs, environ: Mapping[str, str]) -> tuple[Host, ...]:
    """The hosts of the hostfile that the filters leave, in the order of ranks; empty without a hostfile."""
    runtime = args.runtime
    if runtime.launcher == "local":
        return ()
    choice = Hosts(
        hostfile=runtime.hostfile,
        include=runtime.include,
        exclude=runtime.exclude,
        num_nodes=runtime.num_nodes,
        num_gpus=runtime.num_gpus,
    )
    if find_hostfile(choice, environ) is None:
        return ()
    try:
        slots = read_hosts(choice, environ)
    except HostError as error:
        raise ConfigError(str(error), where="hostfile", fix="name an existing hostfile and hosts of it, or none for this machine") from None
    hosts = _numbered(slots)
    commands.check_names(hosts)
    total = sum(len(host.slots) for host in hosts)
    if total != (runtime.global_num_gpus or total):
        raise ConfigError(
            f"the hostfile and its filters give {total} ranks, but global_num_gpus is {runtime.global_num_gpus}",
            where="global_num_gpus, hostfile",
            fix="leave global_num_gpus out, or choose hosts with include, num_nodes or num_gpus",
        )
    return hosts


def _numbered(slots: Mapping[str, Sequence[int | str]]) -> tuple[Host, ...]:
    hosts: list[Host] = []
    first = 0
    for name, numbers in slots.items():
        hosts.append(Host(name=name, slots=tuple(numbers), first=first))
        first += len(numbers)
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


def this_machine(args: NeoXArgs, environ: Mapping[str, str]) -> Host:
    """This machine with the devices that its ranks get; without CUDA their numbers only count the ranks."""
    return Host(name="localhost", slots=tuple(_local_devices(args, environ, cuda_devices(environ))), first=0)


def cuda_devices(environ: Mapping[str, str]) -> int:
    """CUDA devices of this machine that ranks may use; 0 where they run on CPU."""
    return visible_devices(environ) if environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0


def _local_devices(args: NeoXArgs, environ: Mapping[str, str], on_cuda: int) -> list[int | str]:
    """Device numbers of the local ranks; without CUDA they only count the ranks."""
    runtime, count = args.runtime, args.runtime.global_num_gpus or 1
    if runtime.num_nodes and runtime.num_nodes > 1:
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
    return pool[:count]


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


def local_port(args: NeoXArgs, environ: Mapping[str, str]) -> int:
    """The key where it was given, else MASTER_PORT, else a free port, so that two runs on one machine do not meet."""
    if args.origin("master_port").kind != "default" or environ.get("MASTER_PORT", "").isdecimal():
        return meeting_port(args, environ)
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def meeting_port(args: NeoXArgs, environ: Mapping[str, str]) -> int:
    """The key where it was given, else MASTER_PORT, else one that belongs to the SLURM job, else the key's default."""
    if args.origin("master_port").kind != "default":
        return args.runtime.master_port
    if environ.get("MASTER_PORT", "").isdecimal():
        return int(environ["MASTER_PORT"])
    return slurm_port(environ) if environ.get("SLURM_JOB_ID", "").isdecimal() else args.runtime.master_port
