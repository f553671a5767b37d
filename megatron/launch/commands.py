# SPDX-License-Identifier: Apache-2.0
"""Argument lists of the programs that reach other machines. No text here is for a shell."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence

from megatron.errors import ConfigError
from megatron.launch.plan import Host

# What every program below takes for one plain host name or address.
HOST_NAME = re.compile(r"(\w[\w.-]*@)?\w[\w.:-]*")
AGENT = ("-u", "-m", "megatron.launch.agent", "--task")


def check_names(hosts: Iterable[Host]) -> None:
    """Raise ConfigError for a host name that a launcher would take for a flag or a pattern."""
    for host in hosts:
        if not HOST_NAME.fullmatch(host.name):
            raise ConfigError(
                f"{host.name!r} is not a host name", where="hostfile", fix="write plain names or addresses: letters, digits and . - _ :"
            )


def pdsh(hosts: Sequence[Host]) -> tuple[str, ...]:
    """pdsh starts one `reach` per host, which goes there with ssh; pdsh itself replaces %h, so a % in a path is doubled."""
    names = ",".join(host.name for host in hosts)
    reach = (sys.executable.replace("%", "%%"), "-u", "-m", "megatron.launch.ssh_agent", "%h")
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
    return (*argv, sys.executable, *AGENT, *worker)


def mpich(hosts: Sequence[Host], names: Sequence[str], worker: Sequence[str]) -> tuple[str, ...]:
    """MPICH's Hydra. Environment goes by name; the values travel through its own connections."""
    total = sum(len(host.slots) for host in hosts)
    argv = [program("mpirun.mpich", "mpiexec.hydra", "mpirun"), "-n", str(total)]
    argv += ["-hosts", ",".join(f"{host.name}:{len(host.slots)}" for host in hosts), "-wdir", os.getcwd(), "-genvlist", ",".join(names)]
    return (*argv, sys.executable, *AGENT, *worker)


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
    return (*argv, sys.executable, *AGENT, *worker)


def program(*names: str) -> str:
    """The first of the names that is installed here; the last one if none is, and starting it will say so."""
    return next((name for name in names if shutil.which(name)), names[-1])
