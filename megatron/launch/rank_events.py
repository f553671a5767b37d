# SPDX-License-Identifier: Apache-2.0
"""What is known of ranks that ended: written by the rank, carried as marked lines of stderr, told as one report.

A rank that fails leaves a file (`write_failure`). Whoever started the rank reads it (`read_failure`) and tells a RankEvents: directly,
or from another machine through lines that `Lines` picks out of a launcher's output.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron.atomic_io import atomic_write
from megatron.errors import ExitStatus
from megatron.secrets import redact

FAILURE_FILE = "NEOX_FAILURE_FILE"
OWNED_FILE = "NEOX_FAILURE_FILE_OF"
# Enough for any traceback worth reading; the end says most.
LONGEST_TEXT = 16_000
# Launchers pass on whole lines, but cut and mix long ones.
PIECE = 600
MARK = "@neox-launch"
LINE = re.compile(rf"{MARK} (\S+) (\d+)/(\d+) ([A-Za-z0-9+/=]+)\s*$")
LOST = 1
TRACE = "Traceback (most recent call last)"
SIGNALLED = 128
LEAVING = (ExitStatus.REQUEUE, ExitStatus.NO_PROGRESS, ExitStatus.INTERRUPTED)
"""Statuses of a rank that was asked to end before it was done, and did so in order."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a rank, or to all ranks of a host.

    what:        "started", "ended" in order, "failed", "stopped" on request, or "lost" without a word
    rank:        None for a whole host
    at:          seconds since 1970, by the clock of `host`
    code:        as subprocess gives it: an exit status, or -n for signal n
    consequence: the rank failed because another one was gone
    about:       the rank that the text is about, where it is another one, which could not tell itself
    """

    what: str
    host: str
    rank: int | None
    at: float = 0.0
    code: int = 0
    text: str = ""
    consequence: bool = False
    about: int | None = None


def claim(environ: MutableMapping[str, str]) -> str | None:
    """Where this process is to leave its last words; what it starts in its turn does not find the place. None where nobody asks."""
    note = environ.pop(FAILURE_FILE, None)
    if note is not None:
        environ[OWNED_FILE] = f"{os.getpid()} {note}"
    return note


def claimed(environ: Mapping[str, str]) -> str | None:
    """What `claim` gave to this very process."""
    owner, _, note = environ.get(OWNED_FILE, "").partition(" ")
    return note if owner == str(os.getpid()) else None


def write_failure(path: str, text: str, *, consequence: bool, about: int | None = None) -> None:
    """Write a failing rank's own words, or those about another one, where its starter looks for them."""
    record = {"at": time.time(), "text": redact(text)[-LONGEST_TEXT:], "consequence": consequence, "about": about}
    with atomic_write(Path(path), durable=False) as file:
        file.write(json.dumps(record))


def read_failure(path: Path, *, host: str, rank: int, code: int) -> Event:
    """The failure of a rank that ended with `code`: in its own words if it left any."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Event(what="failed", host=host, rank=rank, at=time.time(), code=code, text=_cause(code))
    return Event(what="failed", host=host, rank=rank, code=code, **record)


def _cause(code: int) -> str:
    if code >= 0:
        return f"ended with exit status {code}; what it wrote itself is above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (": the machine may have run out of memory" if -code == signal.SIGKILL else "")


def shell_status(code: int) -> int:
    """The exit status as a shell shows it: 128 + n for signal n."""
    return SIGNALLED - code if code < 0 else code


# Over the wire


def lines_of(event: Event, sender: str) -> Iterator[str]:
    """The event as short marked lines.

    sender: one word, different for every event under way
    """
    text = base64.b64encode(json.dumps(asdict(event)).encode()).decode()
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    for number, piece in enumerate(pieces, start=1):
        yield f"{MARK} {sender} {number}/{len(pieces)} {piece}"


class Lines:
    """Picks events out of a stream of lines, of several senders mixed."""

    def __init__(self) -> None:
        self._pieces: dict[str, dict[int, str]] = {}

    def take(self, line: str) -> Event | str | None:
        """An event that is complete now, None within one, or the line itself if it is not of ours."""
        match = LINE.search(line)
        if not match:
            return line
        sender, number, total = match[1], int(match[2]), int(match[3])
        pieces = self._pieces.setdefault(sender, {})
        pieces[number] = match[4]
        if len(pieces) < total:
            return None
        del self._pieces[sender]
        try:
            return Event(**json.loads(base64.b64decode("".join(pieces[key] for key in sorted(pieces)))))
        except (binascii.Error, ValueError, TypeError):
            return line


# The report


@dataclass
class RankEvents:
    """All events of a run, in the order they were heard.

    hosts: {rank: host} as planned
    """

    hosts: Mapping[int, str]
    events: list[Event] = field(default_factory=list)

    def note(self, event: Event) -> None:
        """Add one event. A lost host is a loss of each of its ranks that has not ended; losses elsewhere follow from the first cause."""
        if event.what == "lost" and any(known.host != event.host and not known.consequence for known in self.failures()):
            return
        if event.rank is not None:
            self.events.append(event)
            return
        over = {known.rank for known in self.events if known.what != "started"}
        for rank, host in self.hosts.items():
            if host == event.host and rank not in over:
                self.events.append(replace(event, rank=rank))

    def failures(self) -> list[Event]:
        """First causes before consequences, each by time; losses count as causes."""
        failed = [event for event in self.events if event.what in ("failed", "lost")]
        return sorted(failed, key=lambda event: (event.consequence, event.at))

    def close(self, *, failed: bool) -> None:
        """The run is over.

        failed: the launcher says that something went wrong; ranks that started and of whose end nobody heard are then lost
        """
        over = {event.rank for event in self.events if event.what != "started"}
        silent = [event for event in self.events if event.what == "started" and event.rank not in over]
        # Where a cause is known, the launcher killed the others before they could tell.
        if not failed or any(not event.consequence for event in self.failures()):
            return
        for event in silent:
            text = "lost: nothing was heard of its end; it was killed together with what watched it, or its host is gone"
            self.events.append(Event(what="lost", host=event.host, rank=event.rank, at=event.at, code=LOST, text=text))

    def left(self) -> int | None:
        """The status with which ranks ended in order: 0 of all that are done, or what was told to stop left with; None where none did."""
        done = {event.rank for event in self.events if event.what == "ended"}
        if done == set(self.hosts):
            return ExitStatus.DONE
        return next((int(event.code) for event in self.events if event.what == "stopped" and event.code in LEAVING), None)

    def status(self) -> int:
        """The first failing rank's exit status as a shell shows it; 0 without failures."""
        failed = self.failures()
        return shell_status(failed[0].code) or LOST if failed else 0

    def report(self) -> str:
        """The first failing rank with all it said, then one line for each of the others; empty without failures."""
        failed = self.failures()
        if not failed:
            return ""
        first, *others = failed
        if len(self.hosts) == 1:
            return first.text
        same = [event for event in others if event.text == first.text]
        rest = [event for event in others if event.text not in ("", first.text) and event.rank != first.rank]
        subject = first if first.about is None else replace(first, rank=first.about, host=self.hosts.get(first.about, first.host))
        heading = _name(subject) + (f" (and {_ranks(same)} in the same way)" if same else "")
        lines = [f"{heading} failed first:", first.text]
        lines += [f"then {_name(event)}: {event.text.strip().splitlines()[-1 if TRACE in event.text else 0]}" for event in rest]
        return "\n".join(lines)


def _name(event: Event) -> str:
    return f"rank {event.rank} on {event.host}"


def _ranks(events: list[Event]) -> str:
    return f"rank{'s' * (len(events) > 1)} {', '.join(str(event.rank) for event in sorted(events, key=lambda event: event.rank or 0))}"
