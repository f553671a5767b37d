# SPDX-License-Identifier: Apache-2.0
"""From the configuration to a LaunchPlan: which launcher, with which argument lists and environment."""

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
from megatron.launch.environment import LOOPBACK, environment_file, expand, handed_on, python_path, slurm_port
from megatron.secrets import is_secret

from .neox_args import NeoXArgs
from .placement import Hosts, chosen_hosts, cuda_devices, find_hostfile, is_here, this_machine

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
    hosts = chosen_hosts(runtime, environ)
    if runtime.autotuning_run or (runtime.launcher in DEEPSPEED_ONLY and (hosts or runtime.force_multi)):
        return _deepspeed_plan(args, script, script_args, environ)
    if runtime.launcher == "slurm" or runtime.deepspeed_slurm:
        if environ.get("SLURM_JOB_ID"):
            return _remote_plan(args, "slurm", worker, hosts, environ)
        if hosts or runtime.force_multi:
            raise ConfigError(
                "the slurm launcher starts ranks inside a SLURM job, and this is none (SLURM_JOB_ID is not set)",
                where="launcher",
                fix="start deepy.py in a job: sbatch pretrain_neox.sbatch CONF, or salloc first",
            )
    alone = not hosts or (len(hosts) == 1 and is_here(hosts[0].name))
    if alone and not runtime.force_multi:
        return _local_plan(args, worker, hosts, environ)
    return _remote_plan(args, runtime.launcher, worker, hosts or (this_machine(runtime, environ),), environ)


def _local_plan(args: NeoXArgs, worker: tuple[str, ...], hosts: tuple[Host, ...], environ: Mapping[str, str]) -> LaunchPlan:
    slots = (hosts[0] if hosts else this_machine(args.runtime, environ)).slots
    return LaunchPlan(
        launcher="local",
        hosts=(Host(name=socket.gethostname(), slots=slots, first=0),),
        worker=worker,
        env={"PYTHONPATH": python_path(environ)},
        set_devices=cuda_devices(environ) > 0,
        master_addr=args.runtime.master_addr or LOOPBACK,
        master_port=_local_port(args, environ),
    )


def _remote_plan(args: NeoXArgs, launcher: str, worker: tuple[str, ...], hosts: tuple[Host, ...], environ: Mapping[str, str]) -> LaunchPlan:
    """Several machines: pdsh, mpirun, or srun inside a SLURM job, whose step the hostfile narrows if there is one."""
    runtime = args.runtime
    job = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    first = hosts[0].name if hosts else expand(job)[0] if job else socket.gethostname()
    address, port = runtime.master_addr or environ.get("MASTER_ADDR") or first, _meeting_port(args, environ)
    # Beyond this process's own environment: what the user's environment file says, and the project's folder for Python.
    additions = environment_file(environ, Path(environ.get("HOME") or "~").expanduser(), Path.cwd())
    additions["PYTHONPATH"] = python_path({**environ, **additions})
    if launcher != "pdsh":
        additions |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    told = {**handed_on(environ), **additions}
    secrets = tuple(name for name in told if is_secret(name))
    told = {name: value for name, value in told.items() if name not in secrets}
    listed = [*told, *secrets, ADDRESSES, SECRET]
    if launcher == "pdsh":
        argv = commands.pdsh(hosts)
    elif launcher == "openmpi":
        argv = commands.openmpi(hosts, listed, worker, root=os.geteuid() == 0)
    elif launcher == "mpich":
        argv = commands.mpich(hosts, listed, worker)
    else:
        options = {"comment": runtime.comment, "account": runtime.account}
        filtered = bool(hosts and (runtime.include or runtime.exclude or runtime.num_nodes > 0))
        argv = commands.slurm(hosts, runtime.global_num_gpus or 1, worker, options, name_hosts=filtered)
    return LaunchPlan(
        launcher=launcher,
        hosts=hosts,
        worker=worker,
        argv=argv,
        env=additions,
        handed_on=told,
        secrets=secrets,
        # Each rank of mpirun picks its device by its local rank; only pdsh's agent can choose for a whole host.
        set_devices=launcher == "pdsh" and environ.get("DS_ACCELERATOR") != "cpu" and environ.get("CUDA_VISIBLE_DEVICES") != "",
        master_addr=address,
        master_port=port,
    )


def _deepspeed_plan(args: NeoXArgs, script: str, script_args: Sequence[str], environ: Mapping[str, str]) -> LaunchPlan:
    """DeepSpeed's own runner: its autotuner, and the MPIs that only it knows."""
    runtime = args.runtime
    level = "debug" if environ.get("LOGLEVEL", "").upper() == "DEBUG" else "critical"
    argv = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--no_local_rank", f"--log_level={level}"]
    address, port = runtime.master_addr or environ.get("MASTER_ADDR"), _meeting_port(args, environ)
    slurm = {"comment": runtime.comment, "account": runtime.account} if runtime.launcher == "slurm" else {}
    flags = {
        "hostfile": find_hostfile(Hosts(hostfile=runtime.hostfile), environ),
        "launcher": "pdsh" if runtime.launcher == "local" else runtime.launcher,
        "master_port": port,
        "master_addr": address,
        "include": runtime.include,
        "exclude": runtime.exclude,
        "num_nodes": runtime.num_nodes if runtime.num_nodes > 0 else None,
        # DeepSpeed takes a count or a filter, not both; the filter says more.
        "num_gpus": None if runtime.include or runtime.exclude else runtime.num_gpus,
        "autotuning": runtime.autotuning_run,
        # Flags for srun, quoted as DeepSpeed splits them.
        "launcher_args": shlex.join(f"--{name}={value}" for name, value in slurm.items() if value),
    }
    argv += [f"--{name}={value}" for name, value in flags.items() if value]
    argv += [f"--{name}" for name in ("force_multi", "no_ssh_check") if getattr(runtime, name)]
    unsafe = next((word for word in (script, *script_args, address or "") if not SHELL_SAFE.fullmatch(word)), None)
    if runtime.launcher == "pdsh" and unsafe is not None:
        raise ConfigError(
            f"DeepSpeed's pdsh runner would hand {unsafe!r} to a remote shell",
            where="launcher",
            fix="use a name of letters, digits and @%+=:,./~-_ only, or another launcher",
        )
    return LaunchPlan(
        launcher="deepspeed",
        hosts=(),
        worker=(script, *script_args),
        argv=(*argv, script, *script_args),
        env={"PYTHONPATH": python_path(environ)},
        master_addr=address or LOOPBACK,
        master_port=port,
    )


# The port where the ranks meet


def _local_port(args: NeoXArgs, environ: Mapping[str, str]) -> int:
    """The key where it was given, else MASTER_PORT, else a free port, so that two runs on one machine do not meet."""
    if args.origin("master_port").kind != "default" or environ.get("MASTER_PORT", "").isdecimal():
        return _meeting_port(args, environ)
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _meeting_port(args: NeoXArgs, environ: Mapping[str, str]) -> int:
    """The key where it was given, else MASTER_PORT, else one that belongs to the SLURM job, else the key's default."""
    if args.origin("master_port").kind != "default":
        return args.runtime.master_port
    if environ.get("MASTER_PORT", "").isdecimal():
        return int(environ["MASTER_PORT"])
    return slurm_port(environ) if environ.get("SLURM_JOB_ID", "").isdecimal() else args.runtime.master_port
