# SPDX-License-Identifier: Apache-2.0
"""From the configuration to a LaunchPlan: which launcher, with which argument lists and environment. Starts nothing."""

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
from megatron.launch.environment import LOOPBACK, environment_file, expand, handed_on, python_path
from megatron.secrets import is_secret

from .hostfile import Hosts, find_hostfile
from .neox_args import NeoXArgs
from .placement import chosen_hosts, cuda_devices, is_here, local_port, meeting_port, this_machine

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
    hosts = chosen_hosts(args, environ)
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
    return _remote_plan(args, worker, hosts or (this_machine(args, environ),), environ)


# One machine


def _local_plan(args: NeoXArgs, worker: tuple[str, ...], hosts: tuple[Host, ...], environ: Mapping[str, str]) -> LaunchPlan:
    slots = (hosts[0] if hosts else this_machine(args, environ)).slots
    return LaunchPlan(
        launcher="local",
        hosts=(Host(name=socket.gethostname(), slots=slots, first=0),),
        worker=worker,
        env={"PYTHONPATH": python_path(environ)},
        set_devices=cuda_devices(environ) > 0,
        master_addr=args.runtime.master_addr or LOOPBACK,
        master_port=local_port(args, environ),
    )


# Several machines


def _remote_plan(args: NeoXArgs, worker: tuple[str, ...], hosts: tuple[Host, ...], environ: Mapping[str, str]) -> LaunchPlan:
    runtime = args.runtime
    address, port = runtime.master_addr or environ.get("MASTER_ADDR") or hosts[0].name, meeting_port(args, environ)
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
    address, port = runtime.master_addr or environ.get("MASTER_ADDR") or first, meeting_port(args, environ)
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
    address, port = runtime.master_addr or environ.get("MASTER_ADDR"), meeting_port(args, environ)
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
