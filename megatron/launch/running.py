# SPDX-License-Identifier: Apache-2.0
"""Runs a LaunchPlan to its end: starts it, hands signals on, and when a rank dies, ends the others and reports the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from megatron.launch.environment import PRIVATE, Seat, machine_environment
from megatron.launch.launcher_process import Launched
from megatron.launch.plan import LaunchPlan
from megatron.launch.rank_events import SIGNALLED, RankEvents, shell_status
from megatron.launch.signals import noting_signals
from megatron.launch.supervisor import POLL_S, Rank, Supervisor

HANDED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


def run(plan: LaunchPlan, environ: Mapping[str, str], *, told: Callable[[str], object]) -> int:
    """Start the plan, hand signals on to its ranks, wait, and return the exit status a shell would show.

    told: takes the report when ranks have failed
    A rank's own exit status comes through, such as 75 from ranks that were told to stop and have saved; a rank killed by signal n gives
    128 + n, and so does a signal n to us about which the ranks say nothing.
    """
    rank_events = RankEvents(plan.places())
    base = {name: value for name, value in environ.items() if name not in PRIVATE or name == "CUDA_VISIBLE_DEVICES"}
    with noting_signals(HANDED_ON) as received:
        code = _run_here(plan, base, rank_events, received) if not plan.argv else Launched(plan, base, rank_events, received).run()
    left = rank_events.left()
    rank_events.close(failed=code != 0 and not received and left is None)
    if report := rank_events.report():
        told(report)
    if any(not failure.consequence for failure in rank_events.failures()):
        return rank_events.status()
    if left is not None:
        return left
    return SIGNALLED + received[0] if received else rank_events.status() or shell_status(code)


def _run_here(plan: LaunchPlan, environ: Mapping[str, str], rank_events: RankEvents, received: list[int]) -> int:
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
    supervisor = Supervisor(host.name, rank_events.note)
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
