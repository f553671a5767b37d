# SPDX-License-Identifier: Apache-2.0
"""Runs a Plan to its end: starts it, hands signals on, and when a rank dies, ends the others and reports the first."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from megatron.launch.environment import PRIVATE, Seat, machine_environment
from megatron.launch.launched import Launched
from megatron.launch.plan import Plan
from megatron.launch.records import SIGNALLED, Ledger, shell_status
from megatron.launch.supervisor import POLL_S, Rank, Supervisor


def run(plan: Plan, environ: Mapping[str, str], *, told: Callable[[str], object]) -> int:
    """Start the plan, hand SIGINT, SIGTERM, SIGHUP and SIGUSR1 on to its ranks, wait, and return the exit status a shell would show.

    told: takes the report when ranks have failed
    A rank's own exit status comes through, a rank killed by signal n gives 128 + n. Where ranks were told to stop, by us or otherwise, and
    did in order, theirs is the status (see ExitCode); where a signal n simply ended them, 128 + n.
    """
    ledger = Ledger(plan.places())
    base = {name: value for name, value in environ.items() if name not in PRIVATE or name == "CUDA_VISIBLE_DEVICES"}
    with _noting_signals() as received:
        code = _run_here(plan, base, ledger, received) if not plan.argv else Launched(plan, base, ledger, received).run()
    ledger.close(failed=code != 0 and not received)
    if report := ledger.report():
        told(report)
    if failed := ledger.status():
        return failed
    left = ledger.left()
    if left is not None:
        return left
    return SIGNALLED + received[0] if received else shell_status(code)


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Within, signals are only written down, in the list that is given."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    before = {name: signal.signal(name, note) for name in names}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _run_here(plan: Plan, environ: Mapping[str, str], ledger: Ledger, received: list[int]) -> int:
    """The ranks as our own children."""
    (host,) = plan.hosts
    base = {**environ, **plan.env}
    base |= machine_environment(base, plan.world_size)
    if plan.set_devices:
        base["CUDA_VISIBLE_DEVICES"] = ",".join(str(slot) for slot in host.slots)
    size = plan.world_size
    ranks = []
    for rank in range(size):
        seat = Seat(
            rank=rank, local_rank=rank, world_size=size, local_size=size, master_addr=plan.master_addr, master_port=plan.master_port
        )
        ranks.append(Rank(number=rank, argv=plan.worker, environment={**base, **seat.environment()}))
    supervisor = Supervisor(host.name, ledger.note)
    handled = 0
    try:
        supervisor.start(ranks)
        while supervisor.alive():
            for signum in received[handled:]:
                handled += 1
                supervisor.signal(signum)
            time.sleep(POLL_S)
    finally:
        supervisor.close()
    return 0
