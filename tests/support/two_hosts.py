# SPDX-License-Identifier: Apache-2.0
"""Two "hosts" on this machine, each with its own network, name, processes and sshd. Needs root; knows nothing of training.

    with TwoHosts(folder) as hosts:
        hosts.run("hosta", ["ssh", "hostb", "hostname"])
        hosts.kill("hostb")

Both see the same files. A host is a set of Linux namespaces held by one sleeping process, the first of its process
namespace: when that is killed, the kernel kills every process of the host, as a power cut would.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from support.rank import die_with_parent

ADDRESSES = {"hosta": "10.78.0.1", "hostb": "10.78.0.2"}
PROGRAMS = ("unshare", "nsenter", "ip", "mount", "ssh", "ssh-keygen", "sshd")
SSHD_FOLDER = "/usr/sbin"
LIFETIME_S = 3600

# $1 name, $2 hosts file, $3 ssh_config: become the host, say so, and stay.
BECOME = """\
set -e
hostname "$1"
mount --make-rprivate /
mount --bind "$2" /etc/hosts
mount --bind "$3" /etc/ssh/ssh_config
ip link set lo up
exec sleep "$4"
"""


def missing(*programs: str) -> str | None:
    """Why two hosts cannot be had here, or None."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    absent = [name for name in (*PROGRAMS, *programs) if not find(name)]
    if absent:
        return f"{', '.join(absent)} not installed"
    if not Path("/etc/ssh/ssh_config").is_file():
        return "there is no /etc/ssh/ssh_config"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, timeout=30)
    return None if tried.returncode == 0 else f"namespaces are refused: {tried.stderr.decode(errors='replace').strip()}"


def find(program: str) -> str | None:
    """Where a program is; sshd is often outside of a user's PATH."""
    return shutil.which(program) or shutil.which(program, path=SSHD_FOLDER)


class TwoHosts:
    """hosta and hostb, joined by a cable; both alive within the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> TwoHosts:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """`argv` as it must be started to run on `host`, in the caller's folder."""
        return ["nsenter", f"--target={self._first(host)}", "--net", "--uts", "--mount", "--pid", f"--wd={os.getcwd()}", *argv]

    def run(self, host: str, argv: Sequence[str], *, timeout_s: float = 60, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run `argv` on `host` to its end."""
        return subprocess.run(self.command(host, argv), capture_output=True, text=True, timeout=timeout_s, check=False, **more)

    def start(self, host: str, argv: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        """Start `argv` on `host`."""
        return subprocess.Popen(self.command(host, argv), text=True, **more)

    def kill(self, host: str) -> None:
        """End every process of the host at once; its network goes with them."""
        os.kill(self._first(host), signal.SIGKILL)

    def unplug(self) -> None:
        """Take the cable away: both hosts live on, and no packet arrives any more."""
        subprocess.run(self.command("hostb", ["ip", "link", "set", "eth0", "down"]), check=True, timeout=30)

    def _first(self, host: str) -> int:
        """The host's first process, by its number outside."""
        keeper = self._keepers[host].pid
        deadline = time.monotonic() + 10
        while not (children := Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{host} has no process")
            time.sleep(0.02)
        return int(children[0])

    def _start(self) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items()))
        for name in ("user", "server"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=30)
        options = {
            "IdentityFile": f'"{folder}/user"',
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
        }
        (folder / "ssh_config").write_text("Host hosta hostb\n" + "".join(f"  {key} {value}\n" for key, value in options.items()))
        isolate = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        for name in ADDRESSES:
            words = [name, str(folder / "hosts"), str(folder / "ssh_config"), str(LIFETIME_S)]
            # Killed with the test's process, however that ends.
            command = [*isolate, "sh", "-c", BECOME, "sh", *words]
            self._keepers[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        for name in ADDRESSES:
            self._await(name, ["cat", "/proc/1/cmdline"], "sleep")
        self._connect()
        for name, address in ADDRESSES.items():
            self._sshd(name, address)
        self._await("hosta", ["ssh", "hostb", "hostname"], "hostb")

    def _connect(self) -> None:
        first = {name: str(self._first(name)) for name in ADDRESSES}
        ends = ["ip", "link", "add", "eth0", "netns", first["hosta"], "type", "veth", "peer", "name", "eth0", "netns", first["hostb"]]
        subprocess.run(ends, check=True, timeout=30)
        for name, address in ADDRESSES.items():
            for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                subprocess.run(self.command(name, ["ip", *words]), check=True, timeout=30)

    def _sshd(self, name: str, address: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        (self.folder / "authorized").write_bytes((self.folder / "user.pub").read_bytes())
        options = {
            "AuthorizedKeysFile": self.folder / "authorized",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "ListenAddress": address,
            "PermitRootLogin": "prohibit-password",
        }
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        sshd = find("sshd") or "sshd"
        command = self.command(name, [sshd, "-f", "/dev/null", "-h", str(self.folder / "server"), "-E", str(self.folder / f"{name}.log")])
        subprocess.run([*command, *flags], check=True, timeout=30)

    def _await(self, host: str, argv: Sequence[str], expected: str) -> None:
        deadline = time.monotonic() + 20
        while True:
            told = self.run(host, argv, timeout_s=20)
            if expected in told.stdout:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{host}: {' '.join(argv)} says {told.stdout!r} {told.stderr!r}")
            time.sleep(0.05)

    def _stop(self) -> None:
        for keeper in self._keepers.values():
            keeper.kill()  # --kill-child: its child, the host's first process, goes too
        for keeper in self._keepers.values():
            keeper.wait()
