# SPDX-License-Identifier: Apache-2.0
"""A TCP line from the agent of each rank back to the launcher, where mpirun or srun lies between them.

Agents tell events over it and get orders. That it breaks tells which rank was lost first, which mpirun does not say. Where no address
of the launcher can be reached, agents fall back to marked lines on stderr.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from megatron.launch.rank_events import LOST, Event

ADDRESSES, SECRET = "NEOX_LAUNCH_WIRE", "NEOX_LAUNCH_SECRET"
CONNECT_S = 3.0
# A host that vanished is noticed after 12 to 16 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 4, "TCP_KEEPCNT": 3}
LONGEST_LINE = 1 << 20
DISCARD_PORT = 9


@dataclass
class _AgentLine:
    """One agent's connection. rank: None until it has shown that it belongs to this run; over: its rank's end was told"""

    connection: socket.socket
    received: bytes = b""
    rank: int | None = None
    host: str = ""
    over: bool = False


class ControlServer:
    """The launcher's end.

    note: called with every Event, and with a loss for a line that breaks before its rank's end was told
    """

    def __init__(self, note: Callable[[Event], None]) -> None:
        self._note = note
        self._secret = secrets.token_hex(16)
        self._listener = socket.create_server(("", 0), backlog=1024)
        self._listener.setblocking(False)
        self._lines: list[_AgentLine] = []

    def environment(self, hosts: Iterable[str]) -> dict[str, str]:
        """What agents need to find this end; hosts: where they will be, as far as that is known."""
        names = dict.fromkeys([*_addresses_towards(hosts), socket.gethostname()])
        return {ADDRESSES: f"{','.join(names)} {self._listener.getsockname()[1]}", SECRET: self._secret}

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have `selector` watch for agents; its keys' data is what `serve` takes."""
        selector.register(self._listener, selectors.EVENT_READ, None)

    def serve(self, selector: selectors.BaseSelector, line: object) -> None:
        """Something came: a new agent (None), or news on its line."""
        if line is None:
            connection, _ = self._listener.accept()
            _keep_alive(connection)
            new = _AgentLine(connection)
            self._lines.append(new)
            selector.register(connection, selectors.EVENT_READ, new)
        elif isinstance(line, _AgentLine):
            try:
                data = line.connection.recv(1 << 16)
            except OSError:
                data = b""
            if not (data and self._read(line, data)):
                selector.unregister(line.connection)
                self._drop(line)

    def order(self, text: str) -> bool:
        """Send an order to every agent. False when there is none."""
        known = [line for line in self._lines if line.rank is not None]
        for line in known:
            _send(line.connection, text.encode() + b"\n")
        return bool(known)

    def close(self) -> None:
        """Hang up."""
        for line in self._lines:
            line.connection.close()
        self._listener.close()

    def _read(self, line: _AgentLine, data: bytes) -> bool:
        """Take what came; False for a stranger."""
        *whole, line.received = (line.received + data).split(b"\n")
        try:
            for raw in whole:
                told = json.loads(raw)
                if line.rank is None:
                    if not hmac.compare_digest(str(told["secret"]), self._secret):
                        return False
                    line.rank, line.host = int(told["rank"]), str(told["host"])
                    continue
                event = Event(**told)
                line.over = line.over or event.what != "started"
                self._note(event)
        except (ValueError, KeyError, TypeError):
            return False
        return len(line.received) < LONGEST_LINE

    def _drop(self, line: _AgentLine) -> None:
        self._lines.remove(line)
        line.connection.close()
        if line.rank is not None and not line.over:
            text = "lost: killed together with what watched it, or its host is gone"
            self._note(Event(what="lost", host=line.host, rank=line.rank, at=time.time(), code=LOST, text=text))


def connect(environ: Mapping[str, str], rank: int, host: str) -> socket.socket | None:
    """An agent's end, introduced to the launcher; None where there is none or it cannot be reached."""
    names, _, port = environ.get(ADDRESSES, "").rpartition(" ")
    for name in names.split(",") if names else ():
        try:
            connection = socket.create_connection((name, int(port)), timeout=CONNECT_S)
        except (OSError, ValueError):
            continue
        connection.settimeout(None)
        _keep_alive(connection)
        _send(connection, json.dumps({"secret": environ.get(SECRET, ""), "rank": rank, "host": host}).encode() + b"\n")
        return connection
    return None


def tell(connection: socket.socket, event: Event) -> bool:
    """Send an event; False when the line is broken."""
    return _send(connection, json.dumps(asdict(event)).encode() + b"\n")


def _send(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _addresses_towards(hosts: Iterable[str]) -> list[str]:
    """This machine's addresses on the ways to some of `hosts`; no packet is sent."""
    found: list[str] = []
    for host in list(hosts)[:3]:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, DISCARD_PORT))
                found.append(str(probe.getsockname()[0]))
        except OSError:
            continue
    # The loopback address means another machine there.
    return [address for address in found if not address.startswith("127.")]
