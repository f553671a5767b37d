# SPDX-License-Identifier: Apache-2.0
"""What will be run, as values: hosts, argument lists, environment. Starts nothing, and shows itself without secrets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron.launch.environment import PRIVATE
from megatron.secrets import mask


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
