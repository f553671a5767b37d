# SPDX-License-Identifier: Apache-2.0
"""From the configuration to a LaunchPlan: hosts, launcher, argument lists. Starts nothing; imports neither torch nor DeepSpeed."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launch import commands
from megatron.launch.commands import Host, LaunchPlan
from megatron.launch.control_channel import ADDRESSES, SECRET
from megatron.launch.environment import LOOPBACK, environment_file, expand, handed_on, python_path, slurm_port, visible_devices
from megatron.secrets import is_secret

from .hostfile import HostError, Hosts, find_hostfile, parse_filter, read_hosts
from .neox_args import NeoXArgs

LOCAL_NAMES = ("localhost", LOOPBACK)
# What a remote shell takes literally: DeepSpeed's pdsh runner hands its command to one.
SHELL_SAFE = re.compile(r"[\w@%+=:,./~-]*")
# Launchers whose argument lists are DeepSpeed's own: nothing here could be tested with them.
DEEPSPEED_ONLY = ("mvapich", "impi")


def plan_launch(args: NeoXArgs, script: str, script_args: Sequence[str], environ: Mapping[str, str]) -> LaunchPlan:
    """What will run `script` with `script_args` on every rank; nothing is started.

    environ: the launching process's environment. Raises ConfigError for a placement that cannot be.
    """
    runtime = args.runtime
    worker = (sys.executable, "-u", script, *script_args)
    if runtime.launcher == "local" and (runtime.hostfile or runtime.force_multi):
        key = "hostfile" if runtime.hostfile else "force_multi"
        raise ConfigError(f"launcher is local, but {key} is set", where=f"launcher, {key}", fix=f"drop {key}, or choose another launcher")
    hosts = _hosts(args, environ)
    if runtime.autotuning_run or (runtime.launcher in DEEPSPEED_ONLY and (hosts or runtime.force_multi)):
        return _deepspeed_plan(args, script, script_args, environ)
    if runtime.launcher == "slurm" or runtime.deepspeed_slurm:
        if not environ.get("SLURM_JOB_ID") and (hosts or runtime.force_multi):
            raise ConfigError(
                "the slurm launcher starts ranks inside a SLURM job, and this is none (SLURM_JOB_ID is not set)",
                where="launcher",
                fix="start deepy.py in a job: sbatch pretrain_neox.sbatch CONF, or salloc first",
            )
        if environ.get("SLURM_JOB_ID"):
            return _slurm_plan(args, worker, hosts, environ)
    alone = not hosts or (len(hosts) == 1 and is_here(hosts[0].name))
    if alone and not runtime.force_multi:
        return _local_plan(args, worker, hosts, environ)
    return _remote_plan(args, worker, hosts or _this_machine(args, environ), environ)


def _hosts(args: NeoXArgs, environ: Mapping[str, str]) -> tuple[Host, ...]:
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


# One machine


def _local_plan(args: NeoXArgs, worker: tuple[str, ...], hosts: tuple[Host, ...], environ: Mapping[str, str]) -> LaunchPlan:
    on_cuda = visible_devices(environ) if environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    slots = hosts[0].slots if hosts else tuple(_local_devices(args, environ, on_cuda))
    return LaunchPlan(
        launcher="local",
        hosts=(Host(name=socket.gethostname(), slots=slots, first=0),),
        worker=worker,
        env={"PYTHONPATH": python_path(environ)},
        set_devices=on_cuda > 0,
        master_addr=args.runtime.master_addr or LOOPBACK,
        master_port=_local_port(args, environ),
    )


def _this_machine(args: NeoXArgs, environ: Mapping[str, str]) -> tuple[Host, ...]:
    """For force_multi without a hostfile."""
    on_cuda = visible_devices(environ) if environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    return (Host(name="localhost", slots=tuple(_local_devices(args, environ, on_cuda)), first=0),)


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


def _local_port(args: NeoXArgs, environ: Mapping[str, str]) -> int:
    """The key where it was given, else MASTER_PORT, else a free port, so that two runs on one machine do not meet."""
    if args.origin("master_port").kind != "default" or environ.get("MASTER_PORT", "").isdecimal():
        return _port(args, environ)
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _port(args: NeoXArgs, environ: Mapping[str, str]) -> int:
    """The key where it was given, else MASTER_PORT, else one that belongs to the SLURM job, else the key's default."""
    if args.origin("master_port").kind != "default":
        return args.runtime.master_port
    if environ.get("MASTER_PORT", "").isdecimal():
        return int(environ["MASTER_PORT"])
    return slurm_port(environ) if environ.get("SLURM_JOB_ID", "").isdecimal() else args.runtime.master_port


# Several machines


def _remote_plan(args: NeoXArgs, worker: tuple[str, ...], hosts: tuple[Host, ...], environ: Mapping[str, str]) -> LaunchPlan:
    runtime = args.runtime
    address, port = runtime.master_addr or environ.get("MASTER_ADDR") or hosts[0].name, _port(args, environ)
    additions = _additions(environ)
    names, secrets = _handed_on(environ, additions)
    if runtime.launcher == "pdsh":
        argv = commands.pdsh(hosts)
    else:
        meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        additions |= meeting
        listed = [*dict.fromkeys((*names, *meeting)), *secrets, ADDRESSES, SECRET]
        if runtime.launcher == "openmpi":
            argv = commands.openmpi(hosts, listed, worker, root=os.geteuid() == 0)
        else:
            argv = commands.mpich(hosts, listed, worker)
    return LaunchPlan(
        launcher=runtime.launcher,
        hosts=hosts,
        worker=worker,
        argv=argv,
        env=additions,
        handed_on=names,
        secrets=secrets,
        # Each rank of mpirun picks its device by its local rank; only pdsh's agent can choose for a whole host.
        set_devices=runtime.launcher == "pdsh" and environ.get("DS_ACCELERATOR") != "cpu" and environ.get("CUDA_VISIBLE_DEVICES") != "",
        master_addr=address,
        master_port=port,
    )


def _slurm_plan(args: NeoXArgs, worker: tuple[str, ...], hosts: tuple[Host, ...], environ: Mapping[str, str]) -> LaunchPlan:
    """Inside a SLURM job: srun, whose step the hostfile narrows if there is one."""
    runtime = args.runtime
    job = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    first = hosts[0].name if hosts else expand(job)[0] if job else socket.gethostname()
    address, port = runtime.master_addr or environ.get("MASTER_ADDR") or first, _port(args, environ)
    options = {"comment": runtime.comment, "account": runtime.account}
    filtered = bool(hosts and (runtime.include or runtime.exclude or (runtime.num_nodes or -1) > 0))
    additions = {**_additions(environ), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    names, secrets = _handed_on(environ, additions)
    return LaunchPlan(
        launcher="slurm",
        hosts=hosts,
        worker=worker,
        argv=commands.slurm(hosts, runtime.global_num_gpus or 1, worker, options, name_hosts=filtered),
        env=additions,
        handed_on=names,
        secrets=secrets,
        master_addr=address,
        master_port=port,
    )


def _additions(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment beyond this process's own: the project's folder for Python, and what the user's environment file says."""
    extra = environment_file(environ, Path(environ.get("HOME") or "~").expanduser(), Path.cwd())
    return {**extra, "PYTHONPATH": python_path({**environ, **extra})}


def _handed_on(environ: Mapping[str, str], additions: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Variables for ranks on other machines, and the names of the secret ones among them."""
    found = {**handed_on(environ), **additions}
    secrets = tuple(name for name in found if is_secret(name))
    return {name: value for name, value in found.items() if name not in secrets}, secrets


# Left to DeepSpeed


def _deepspeed_plan(args: NeoXArgs, script: str, script_args: Sequence[str], environ: Mapping[str, str]) -> LaunchPlan:
    """DeepSpeed's own runner: its autotuner, and the MPIs that only it knows."""
    runtime = args.runtime
    hostfile = find_hostfile(Hosts(hostfile=runtime.hostfile), environ)
    level = "debug" if environ.get("LOGLEVEL", "").upper() == "DEBUG" else "critical"
    argv = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--no_local_rank", f"--log_level={level}"]
    filtered = runtime.include or runtime.exclude
    address, port = runtime.master_addr or environ.get("MASTER_ADDR"), _port(args, environ)
    flags = {
        "hostfile": hostfile,
        "launcher": "pdsh" if runtime.launcher == "local" else runtime.launcher,
        "master_port": port,
        "master_addr": address,
        "include": runtime.include,
        "exclude": runtime.exclude,
        "num_nodes": runtime.num_nodes if (runtime.num_nodes or -1) > 0 else None,
        # DeepSpeed takes a count or a filter, not both; the filter says more.
        "num_gpus": None if filtered else runtime.num_gpus,
        "autotuning": runtime.autotuning_run,
        "launcher_args": _launcher_args(args),
    }
    argv += [f"--{name}={value}" for name, value in flags.items() if value]
    argv += ["--force_multi"] if runtime.force_multi else []
    argv += ["--no_ssh_check"] if runtime.no_ssh_check else []
    if runtime.launcher == "pdsh":
        _refuse_unsafe([script, *script_args, address or ""])
    return LaunchPlan(
        launcher="deepspeed",
        hosts=(),
        worker=(script, *script_args),
        argv=(*argv, script, *script_args),
        env={"PYTHONPATH": python_path(environ)},
        master_addr=address or LOOPBACK,
        master_port=port,
    )


def _launcher_args(args: NeoXArgs) -> str | None:
    """Flags for srun, quoted as DeepSpeed splits them."""
    runtime = args.runtime
    if runtime.launcher != "slurm":
        return None
    words = [f"--comment={runtime.comment}"] if runtime.comment else []
    words += [f"--account={runtime.account}"] if runtime.account else []
    return shlex.join(words) or None


def _refuse_unsafe(words: list[str]) -> None:
    unsafe = [word for word in words if not SHELL_SAFE.fullmatch(word)]
    if unsafe:
        raise ConfigError(
            f"DeepSpeed's pdsh runner would hand {unsafe[0]!r} to a remote shell",
            where="launcher",
            fix="use a name of letters, digits and @%+=:,./~-_ only, or another launcher",
        )
