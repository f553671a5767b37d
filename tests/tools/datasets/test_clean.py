# SPDX-License-Identifier: Apache-2.0
"""The cleaning tool as a person runs it: same bytes whatever the workers, killed and started again, as Slurm jobs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from support.cleaning import nonsense, prose, read_output, write_lines

STAGES = ["--normalise", "--exact", "--filters", "gopher,fineweb", "--near", "minhash", "--pii", "mask"]


@pytest.fixture
def tool(repo):
    """Run the tool; its result."""

    def call(*arguments, environment=None):
        command = [sys.executable, str(repo / "tools" / "datasets" / "clean.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)

    return call


def corpus(folder, documents=40):
    """Good, short, repeated and nearly repeated documents, with fields to keep."""
    rng = random.Random(0)
    records = [{"id": at, "text": prose(rng, 15), "meta": {"n": at, "of": None}} for at in range(documents)]
    records += [{"id": f"again {at}", "text": records[at]["text"].replace(" ", "  "), "meta": {}} for at in range(0, documents, 8)]
    near = [records[at]["text"].split(" ") for at in range(1, documents, 8)]
    records += [{"id": f"near {at}", "text": " ".join([*words[:150], "changed", *words[151:]])} for at, words in enumerate(near)]
    records += [{"id": "short", "text": "too short"}, {"id": "mail", "text": prose(rng, 15) + " Write to jo@mail.org."}]
    rng.shuffle(records)
    return write_lines(folder / "in.jsonl", records)


def contents(folder):
    """name -> bytes of everything in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_cleans_and_reports(tool, tmp_path):
    source = corpus(tmp_path)
    done = tool(source, "--output", tmp_path / "out", *STAGES, "--workers", 1, "--tasks", 3)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kept = read_output(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"exact/same text": 5, "near/near duplicate": 5, "quality/gopher: gopher_short_doc": 1}
    assert report["input"]["documents"] == 52
    assert report["output"]["documents"] == len(kept) == 41
    assert [stage["stage"] for stage in report["stages"]] == ["normalise", "exact", "quality", "near", "pii"]
    into = [stage["documents_in"] for stage in report["stages"]] + [41]
    assert into[1:] == [stage["documents_out"] for stage in report["stages"]]
    given = {record["id"]: record for record in map(json.loads, source.read_text().splitlines())}
    order = [record["id"] for record in kept]
    assert order == [name for name in given if name in set(order)]
    for record in kept:
        text = given[record["id"]]["text"].replace("jo@mail.org", "<EMAIL>")
        assert record == given[record["id"]] | {"text": text}
        assert list(record) == list(given[record["id"]])
    assert not (tmp_path / "out.part").exists()
    # The same again changes nothing; other settings are refused.
    before = (tmp_path / "out").stat().st_mtime_ns
    again = tool(source, "--output", tmp_path / "out", *STAGES, "--workers", 2, "--tasks", 3)
    assert again.returncode == 0 and "there already" in again.stdout
    assert (tmp_path / "out").stat().st_mtime_ns == before
    other = tool(source, "--output", tmp_path / "out", "--exact", "--tasks", 3)
    assert other.returncode == 77
    assert "other inputs or settings" in other.stderr


@pytest.mark.parametrize(
    "form", ["jsonl.gz", pytest.param("jsonl", marks=pytest.mark.full), pytest.param("parquet", marks=pytest.mark.full)]
)
def test_workers_do_not_change_a_byte(form, tool, tmp_path):
    source = corpus(tmp_path)
    for workers in (1, 2):
        arguments = [*STAGES, "--workers", workers, "--tasks", 3, "--format", form]
        done = tool(source, "--output", tmp_path / str(workers), *arguments)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(read_output(tmp_path / "1")) == 41


def test_tasks_do_not_change_the_documents(tool, tmp_path):
    source = corpus(tmp_path, 16)
    found = []
    for tasks in (1, 4):
        assert tool(source, "--output", tmp_path / str(tasks), *STAGES, "--workers", 1, "--tasks", tasks).returncode == 0
        found.append(read_output(tmp_path / str(tasks)))
    assert found[0] == found[1]


def kill_after(command, seconds):
    """Whether the process was killed before it ended."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        # The process alone: its workers may still be at their task when the next run begins.
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_killed_and_started_again(kills, repo, tool, tmp_path):
    source = corpus(tmp_path, 40)
    rng = random.Random(kills)
    arguments = [str(source), *STAGES, "--tasks", "4", "--format", "jsonl.gz"]
    began = time.monotonic()
    assert tool(*arguments, "--output", tmp_path / "whole", "--workers", 2).returncode == 0
    took = time.monotonic() - began
    killed = 0
    for turn in range(kills):
        output = tmp_path / f"out{turn}"
        command = [sys.executable, str(repo / "tools" / "datasets" / "clean.py"), *arguments, "--output", str(output)]
        workers = str(turn % 2 + 1)
        killed += kill_after([*command, "--workers", workers], rng.uniform(0.2, 0.9) * took)
        assert not output.exists() or (output / "report.json").exists()
        done = tool(*arguments, "--output", output, "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert contents(output) == contents(tmp_path / "whole")
        assert not output.with_name(output.name + ".part").exists()
    assert killed


def test_parquet_in_and_out(tool, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"n": at, "text": f"text {at // 2}", "tags": ["a"] * at, "score": None if at < 3 else 0.5} for at in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    done = tool(tmp_path / "in.parquet", "--output", tmp_path / "out", "--exact", "--format", "parquet", "--tasks", 2, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert read_output(tmp_path / "out") == rows[::2]


def test_what_goes_wrong_is_said(tool, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": \n')
    done = tool(tmp_path / "in.jsonl", "--output", tmp_path / "out", "--exact", "--workers", 1)
    assert done.returncode == 77
    assert "in.jsonl:2" in done.stderr and "--skip-bad" in done.stderr
    assert not (tmp_path / "out").exists()
    done = tool(tmp_path / "in.jsonl", "--output", tmp_path / "out", "--exact", "--workers", 1, "--skip-bad", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["input"]["bad_records"]["count"] == 1


SBATCH = """#!/bin/sh
count=$(ls {folder} | wc -l)
for last; do :; done
echo "$@" > {folder}/$count.arguments
cp "$last" {folder}/$count.script
echo "Submitted batch job $((100 + count / 2))"
"""


def test_slurm_scripts(tool, tmp_path):
    """Submission to a stand-in for sbatch; then the jobs' tasks are run here as Slurm would run them."""
    source = corpus(tmp_path, 16)
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(folder=tmp_path / "jobs"))
    sbatch.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    asked = ["--executor", "slurm", "--partition", "cpu", "--time", "01:00:00", "--sbatch", "account=a5k", "--tasks", 3]
    done = tool(source, "--output", tmp_path / "out", *STAGES, *asked, environment=environment)
    assert done.returncode == 0, done.stderr
    scripts = sorted((tmp_path / "out.part" / "logs").glob("*/launch_script.slurm"), key=lambda path: int(path.parent.name.split("-")[0]))
    assert [path.parent.name for path in scripts] == [
        "0-exact-read", "1-exact-find", "2-near-sign", "3-near-pair", "4-near-choose", "5-write", "6-publish",
    ]  # fmt: skip
    for script, tasks in zip(scripts, (3, 16, 3, 14, 1, 3, 1), strict=True):
        text = script.read_text()
        for line in ("partition=cpu", "time=01:00:00", "account=a5k", f"array=0-{tasks - 1}", "cpus-per-task=1", "mem-per-cpu=4G"):
            assert f"#SBATCH --{line}\n" in text, (script, line)
    submitted = sorted((tmp_path / "jobs").glob("*.arguments"), key=lambda path: int(path.stem))
    waits = [path.read_text() for path in submitted]
    assert sum("--dependency=afterok:" in line for line in waits) == len(scripts) - 1
    assert not (tmp_path / "out").exists()


def test_slurm_needs_sbatch(tool, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    arguments = [tmp_path / "in.jsonl", "--output", tmp_path / "out", "--exact", "--executor", "slurm"]
    assert tool(*arguments).returncode == 77
    done = tool(*arguments, "--partition", "cpu", "--time", "1:00:00", environment=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "sbatch is not on this machine" in done.stderr


def test_nonsense_is_refused(tool, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": " ".join(nonsense(random.Random(0), 5))}) + "\n")
    for flags in (
        ["--filters", "gofer"],
        ["--lang", "en"],
        ["--lang", "xx", "--lang-backend", "stopwords"],
        ["--near", "minhash", "--rows", "0"],
    ):
        done = tool(tmp_path / "in.jsonl", "--output", tmp_path / "out", *flags)
        assert done.returncode in (1, 77), flags
        assert "mend:" in done.stderr, flags
