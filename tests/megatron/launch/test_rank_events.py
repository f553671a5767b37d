# SPDX-License-Identifier: Apache-2.0
"""Events survive the way through a launcher's output, and the report begins with the first cause."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from megatron.launch.rank_events import Event, Lines, RankEvents, claim, claimed, lines_of, read_failure, shell_status, write_failure


def failed(rank: int, at: float, text: str = "", *, host: str = "a", code: int = 1, consequence: bool = False) -> Event:
    return Event(what="failed", host=host, rank=rank, at=at, code=code, text=text, consequence=consequence)


def test_long_events_survive_being_cut_and_mixed() -> None:
    events = [failed(rank, rank, f'Traceback "{rank}"\n' + "x\n" * 5000) for rank in range(3)]
    queues = [list(lines_of(event, f"s{index}")) for index, event in enumerate(events)]
    assert all(len(line) < 1000 for queue in queues for line in queue)
    order = [index for index, queue in enumerate(queues) for _ in queue]
    random.Random(0).shuffle(order)
    lines, got = Lines(), []
    for index in order:
        taken = lines.take("hosta: " + queues[index].pop(0) + "\n")
        assert taken is None or isinstance(taken, Event)
        got += [taken] if taken else []
    assert sorted(got, key=lambda event: event.at) == events
    for other in ("iteration 1\n", "@neox-launch is a word\n", "@neox-launch s 1/1 !!!\n", "@neox-launch s 1/1 AAAA\n"):
        assert lines.take(other) == other


def test_a_failing_rank_is_heard_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    write_failure(str(tmp_path / "note"), "cannot log in with hf_verysecret", consequence=True)
    event = read_failure(tmp_path / "note", host="a", rank=1, code=3)
    assert (event.text, event.consequence, event.code) == ("cannot log in with ***", True, 3)
    assert "SIGKILL" in (said := read_failure(tmp_path / "none", host="a", rank=1, code=-signal.SIGKILL).text) and "out of memory" in said
    assert "exit status 7" in read_failure(tmp_path / "none", host="a", rank=1, code=7).text
    assert (shell_status(-9), shell_status(7)) == (137, 7)
    assert os.listdir(tmp_path) == ["note"]


def test_the_first_cause_is_on_top() -> None:
    rank_events = RankEvents({0: "a", 1: "a", 2: "b", 3: "b"})
    for event in (
        failed(0, 1.0, "lost another rank: gloo\n  where: x", consequence=True),
        failed(3, 3.0, "Traceback (most recent call last):\n  File\nValueError: second", host="b"),
        failed(2, 2.0, "Traceback (most recent call last):\n  File\nValueError: first", host="b", code=5),
        Event(what="stopped", host="a", rank=1, code=-15),
    ):
        rank_events.note(event)
    rank_events.close(failed=True)
    lines = rank_events.report().splitlines()
    assert lines[0] == "rank 2 on b failed first:" and lines[3] == "ValueError: first"
    assert lines[4:] == ["then rank 3 on b: ValueError: second", "then rank 0 on a: lost another rank: gloo"]
    assert rank_events.status() == 5


def test_the_same_words_are_told_once_and_a_lone_rank_needs_no_heading() -> None:
    rank_events = RankEvents({0: "a", 1: "a", 2: "a"})
    for rank in (2, 0, 1):
        rank_events.note(failed(rank, float(rank), "no such file"))
    assert rank_events.report().splitlines() == ["rank 0 on a (and ranks 1, 2 in the same way) failed first:", "no such file"]
    alone = RankEvents({0: "a"})
    assert (alone.report(), alone.status()) == ("", 0)
    alone.note(failed(0, 0.0, "no such file", code=2))
    assert (alone.report(), alone.status()) == ("no such file", 2)


def test_lost_hosts_and_silent_ranks_are_named() -> None:
    rank_events = RankEvents({0: "a", 1: "b", 2: "b"})
    rank_events.note(Event(what="ended", host="b", rank=2))
    rank_events.note(failed(0, 1.0, "lost another rank", consequence=True))
    rank_events.note(Event(what="lost", host="b", rank=None, at=9.0, code=1, text="lost: ssh"))
    assert rank_events.report().splitlines()[:2] == ["rank 1 on b failed first:", "lost: ssh"]
    silent = RankEvents({0: "a", 1: "b"})
    for rank, host in ((0, "a"), (1, "b")):
        silent.note(Event(what="started", host=host, rank=rank))
    silent.note(failed(0, 1.0, "lost another rank", consequence=True))
    silent.close(failed=True)
    assert silent.report().startswith("rank 1 on b failed first:\nlost:") and silent.status() == 1
    fine = RankEvents({0: "a"})
    fine.note(Event(what="started", host="a", rank=0))
    fine.close(failed=False)
    assert fine.report() == ""


def test_the_report_begins_with_the_rank_that_a_text_is_about(tmp_path: Path) -> None:
    write_failure(str(tmp_path / "note"), "stuck: rank 1 on b has not been heard of", consequence=False, about=1)
    event = read_failure(tmp_path / "note", host="a", rank=0, code=1)
    (line,) = lines_of(event, "s")
    assert Lines().take(line) == event
    rank_events = RankEvents({0: "a", 1: "b", 2: "b"})
    rank_events.note(failed(2, 0.0, "rank 2 on b waits", consequence=True))
    rank_events.note(event)
    assert rank_events.report() == (
        "rank 1 on b failed first:\nstuck: rank 1 on b has not been heard of\nthen rank 2 on a: rank 2 on b waits"
    )
    assert rank_events.status() == 1


def test_a_note_belongs_to_one_process() -> None:
    environ = {"NEOX_FAILURE_FILE": "/x/a note.json"}
    assert claim(environ) == claimed(environ) == "/x/a note.json" and "NEOX_FAILURE_FILE" not in environ
    assert claimed({name: value.replace(str(os.getpid()), "1") for name, value in environ.items()}) is None
    assert claim({}) is None and claimed({}) is None
