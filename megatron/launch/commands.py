# SPDX-License-Identifier: Apache-2.0
"""What will be run, as values: the plan with its hosts, and the argument lists of the programs that reach other machines."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.errors import ConfigError
from megatron.launch.environment import PRIVATE
from megatron.secrets import mask

# What every program below takes for one plain host name or address.
HOST_NAME = re.compile(r"(\w[\w.-]*@)?\w[\w.:-]*")
AGENT = ("-u", "-m", "megatron.launch.agent")


def check_names(hosts: Iterable[Host]) -> None:
    """Raise ConfigError for a host name that a launcher would take for a flag or a pattern."""
    for host in hosts:
        if not HOST_NAME.fullmatch(host.name):
            raise ConfigError(
                f"{host.name!r} is not a host name", where="hostfile", fix="write plain names or addresses: letters, digits and . - _ :"
            )


def pdsh(hosts: Sequence[Host]) -> tuple[str, ...]:
    """pdsh starts one `agent --ssh` per host, which goes there with ssh; pdsh itself replaces %h, so a % in a path is doubled."""
    names = ",".join(host.name for host in hosts)
    reach = (sys.executable.replace("%", "%%"), *AGENT, "--ssh", "%h")
    # -S: the largest exit status; -N: lines as they are; -R exec: a local program per host
    return ("pdsh", "-S", "-N", "-R", "exec", "-f", str(len(hosts)), "-w", names, *reach)


def openmpi(hosts: Sequence[Host], names: Sequence[str], worker: Sequence[str], *, root: bool) -> tuple[str, ...]:
    """Open MPI's mpirun. Environment goes by name (-x): mpirun takes the values from its own."""
    total = sum(len(host.slots) for host in hosts)
    argv = [program("mpirun.openmpi", "mpirun"), "-n", str(total), "--host", ",".join(f"{host.name}:{len(host.slots)}" for host in hosts)]
    # One core per rank is its default, and leaves a rank's threads one core.
    argv += ["--bind-to", "none", "--map-by", "slot", "--wdir", os.getcwd()]
    argv += ["--allow-run-as-root"] if root else []
    for name in names:
        argv += ["-x", name]
    return (*argv, sys.executable, *AGENT, "--task", *worker)


def mpich(hosts: Sequence[Host], names: Sequence[str], worker: Sequence[str]) -> tuple[str, ...]:
    """MPICH's Hydra. Environment goes by name; the values travel through its own connections."""
    total = sum(len(host.slots) for host in hosts)
    argv = [program("mpirun.mpich", "mpiexec.hydra", "mpirun"), "-n", str(total)]
    argv += ["-hosts", ",".join(f"{host.name}:{len(host.slots)}" for host in hosts), "-wdir", os.getcwd(), "-genvlist", ",".join(names)]
    return (*argv, sys.executable, *AGENT, "--task", *worker)


def slurm(
    hosts: Sequence[Host], total: int, worker: Sequence[str], options: Mapping[str, str | None], *, name_hosts: bool
) -> tuple[str, ...]:
    """srun within an allocation: one task per rank, the whole environment handed on, and all tasks ended when one fails.

    options:    further long flags, left out where None
    name_hosts: whether srun must use exactly these hosts
    """
    argv = ["srun", f"--ntasks={total}", "--kill-on-bad-exit=1", "--export=ALL"]
    sizes = {len(host.slots) for host in hosts}
    if hosts and (len(sizes) > 1 or any(tuple(host.slots) != tuple(range(len(host.slots))) for host in hosts)):
        raise ConfigError(
            "srun starts the same number of ranks on every host, and always on the first devices",
            where="launcher",
            fix="give whole hosts or the first N slots of each, or use launcher: pdsh",
        )
    if hosts:
        argv += [f"--nodes={len(hosts)}", f"--ntasks-per-node={sizes.pop()}"]
    if name_hosts:
        argv.append(f"--nodelist={','.join(host.name for host in hosts)}")
    argv += [f"--{name}={value}" for name, value in options.items() if value]
    return (*argv, sys.executable, *AGENT, "--task", *worker)


def program(*names: str) -> str:
    """The first of the names that is installed here; the last one if none is, and starting it will say so."""
    return next((name for name in names if shutil.which(name)), names[-1])


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine of a run.

    slots: the device number of each of its ranks
    first: the number of its first rank
    """

    name: str
    slots: tuple[int | str, ...]
    first: int


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """A run that can be started.

    launcher:    local, pdsh, openmpi, mpich, slurm; deepspeed where its own runner does the work
    hosts:       in the order of ranks; empty where srun or DeepSpeed places the ranks itself
    worker:      argument list of every rank
    argv:        argument list that is started on this machine; for `local`, empty: the ranks themselves are started
    env:         what is added to the environment of `argv`, and of local ranks
    handed_on:   environment of ranks on other machines that must be told to them, secrets left out
    secrets:     names of the secret variables that ranks on other machines get too
    set_devices: whether CUDA_VISIBLE_DEVICES of each host is its slots
    """

    launcher: str
    hosts: tuple[Host, ...]
    worker: tuple[str, ...]
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    handed_on: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    set_devices: bool = False
    master_addr: str
    master_port: int

    @property
    def world_size(self) -> int:
        """Number of ranks; 0 where it is not planned here."""
        return sum(len(host.slots) for host in self.hosts)

    def places(self) -> dict[int, str]:
        """{rank: host}"""
        return {host.first + index: host.name for host in self.hosts for index in range(len(host.slots))}

    def summary(self) -> str:
        """The plan in one line."""
        if not self.hosts:
            return f"launching with {self.launcher}"
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        where = "this machine" if self.launcher == "local" else ", ".join(host.name for host in self.hosts)
        return f"launching {ranks} on {where} with {self.launcher}, meeting at {self.master_addr}:{self.master_port}"

    def show(self) -> str:
        """The whole plan for reading; the line `run` can be pasted into a shell where the launcher is a program of its own."""
        lines = [f"launcher  {self.launcher}", f"meeting   {self.master_addr}:{self.master_port}"]
        for host in self.hosts:
            last = host.first + len(host.slots) - 1
            ranks = f"rank {host.first}" if last == host.first else f"ranks {host.first}-{last}"
            devices = f", devices {','.join(map(str, host.slots))}" if self.set_devices else ""
            lines.append(f"host      {host.name}: {ranks}{devices}")
        lines += [f"env       {shlex.quote(f'{name}={mask(name, value)}')}" for name, value in sorted(self.env.items())]
        told = {name: value for name, value in self.handed_on.items() if name not in self.env}
        lines += [f"ranks env {shlex.quote(f'{name}={mask(name, value)}')}" for name, value in sorted(told.items()) if name not in PRIVATE]
        lines += [f"ranks env {name}={mask(name, '')} (not on any command line)" for name in self.secrets]
        if self.argv:
            lines.append(f"run       {shlex.join(self.argv)}")
        if self.argv[-len(self.worker) :] != self.worker:
            lines.append(f"each rank {shlex.join(self.worker)}")
        return "\n".join(lines) + "\n"
