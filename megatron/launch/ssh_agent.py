# SPDX-License-Identifier: Apache-2.0
"""Starts the agent of one host over ssh and stays its line to the launcher: `python -m megatron.launch.ssh_agent HOST`, run by pdsh.

What the agent shall do, secrets included, goes through ssh's stdin, never through a command line or a shell: the only text that the
remote shell sees is the folder of the project and the path of Python, both quoted.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from megatron.launch.environment import project_folder
from megatron.launch.rank_events import Event, lines_of
from megatron.launch.supervisor import LAST_S, PATIENT_LAST_S, POLL_S, dying_with_parent

FOLDER = "NEOX_LAUNCH_FOLDER"
PLAN_FILE, ORDERS_FILE = "plan.json", "orders"
# BatchMode: no question can be answered. ServerAlive: a host that vanished is noticed after 12 to 16 seconds.
SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=4", "ServerAliveCountMax=3")
SSH_FAILED = 255
STDIN = 0


def remote_text(root: Path, python: str) -> str:
    """What the shell of the other host is given: starts the agent there.

    >>> remote_text(Path("/my; code"), "/usr/bin/python3")
    "cd '/my; code' && exec /usr/bin/python3 -u -m megatron.launch.agent"
    """
    return f"cd {shlex.quote(str(root))} && exec {shlex.quote(python)} -u -m megatron.launch.agent"


def ssh_command(host: str, environ: Mapping[str, str]) -> list[str]:
    """ssh to a host, with what PDSH_SSH_ARGS_APPEND adds."""
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    more = shlex.split(environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", "-T", "-x", *more, *options, host, remote_text(project_folder(), sys.executable)]


def main(argv: list[str]) -> int:
    """Start the agent, hand it its task and later orders, and return its exit status."""
    (host,) = argv
    folder = Path(os.environ[FOLDER])
    plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    secrets = {name: os.environ[name] for name in plan["secrets"] if name in os.environ}
    told = {**plan["all"], **plan["hosts"][host], "host": host}
    told["environment"] = {**told["environment"], **secrets}
    # Signals end pdsh; this process goes on until the agent has ended.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    ssh = subprocess.Popen(ssh_command(host, os.environ), stdin=subprocess.PIPE, preexec_fn=dying_with_parent(signal.SIGKILL))
    code = _attend(ssh, json.dumps(told).encode() + b"\n", folder / ORDERS_FILE)
    if code == SSH_FAILED or code < 0:
        text = f"lost: the connection to its host ended (ssh, exit status {code}): everything on it was killed, or it cannot be reached"
        event = Event(what="lost", host=host, rank=None, at=time.time(), code=1, text=text)
        sys.stderr.write("".join(f"{line}\n" for line in lines_of(event, f"reach.{host}")))
        sys.stderr.flush()
    return code if code >= 0 else 1


def _attend(ssh: subprocess.Popen[bytes], task: bytes, orders: Path) -> int:
    """Give the agent its task, then every order that appears in the file `orders`, until ssh ends; its exit status."""
    _put(ssh, task)
    seen = 0
    deadline: float | None = None
    while (code := ssh.poll()) is None:
        if deadline is not None:
            time.sleep(POLL_S)
            if time.monotonic() > deadline:
                ssh.kill()
            continue
        ready, _, _ = select.select([STDIN], [], [], POLL_S)
        if ready and not os.read(STDIN, 4096):
            # pdsh, and with it the launcher, is gone: so will be the agent when its orders end.
            deadline = time.monotonic() + PATIENT_LAST_S + LAST_S
            if ssh.stdin:
                ssh.stdin.close()
        elif orders.exists():
            new = orders.read_bytes()[seen:]
            seen += len(new)
            _put(ssh, new)
    return code


def _put(ssh: subprocess.Popen[bytes], data: bytes) -> None:
    try:
        if ssh.stdin and data:
            ssh.stdin.write(data)
            ssh.stdin.flush()
    except BrokenPipeError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
