# SPDX-License-Identifier: Apache-2.0
"""Signals that are written down: by the process that asked for it, and by none of its children."""

from __future__ import annotations

import os
import signal

import pytest

from megatron.launch.signals import note_signals, noting_signals


def test_signals_are_noted_within_and_mean_what_they_meant_after() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noting_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert received == [signal.SIGTERM, signal.SIGUSR1] and signal.getsignal(signal.SIGTERM) is before


def test_who_insists_is_heard() -> None:
    received = note_signals(insisting=True)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGINT]


def test_a_forked_child_ends_by_the_signal() -> None:
    received = note_signals()
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(go, b".")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM and received == []
