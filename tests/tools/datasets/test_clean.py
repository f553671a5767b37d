# SPDX-License-Identifier: Apache-2.0
"""The cleaning tool as a person runs it: same bytes whatever the workers, killed and started again, as Slurm jobs."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron.data.cleaning.plan import CleaningSettings
from megatron.data.cleaning.run import clean
from megatron.errors import BackendError, ConfigError, DataError, NeoXError
from support.cleaning import nonsense, prose, read_output, sentence, write_lines

STAGES = ["--normalise", "--exact", "--filters", "gopher,fineweb", "--near", "minhash", "--pii", "mask"]


@pytest.fixture
def script(repo):
    return repo / "tools" / "datasets" / "clean.py"


@pytest.fixture
def tool(script):
    """The tool's main, in this process."""
    spec = importlib.util.spec_from_file_location("clean_face", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def corpus(folder, documents=40):
    """Good, short, repeated and nearly repeated documents, with fields to keep."""
    rng = random.Random(0)
    records = [{"id": str(at), "text": prose(rng, 15), "meta": {"n": at, "of": None}} for at in range(documents)]
    records += [{"id": f"again {at}", "text": records[at]["text"].replace(" ", "  "), "meta": {}} for at in range(0, documents, 8)]
    near = [records[at]["text"].split(" ") for at in range(1, documents, 8)]
    records += [{"id": f"near {at}", "text": " ".join([*words[:150], "changed", *words[151:]])} for at, words in enumerate(near)]
    records += [{"id": "short", "text": "too short"}, {"id": "mail", "text": prose(rng, 15) + " Write to jo@mail.org."}]
    rng.shuffle(records)
    return write_lines(folder / "in.jsonl", records)


def contents(folder):
    """name -> bytes of everything in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_cleans_and_reports(tool, tmp_path, capfd):
    source = corpus(tmp_path)
    assert tool(source, "--output", tmp_path / "out", *STAGES, "--workers", 1, "--tasks", 3) == 0
    said = capfd.readouterr()
    assert "near duplicate 5" in said.out
    assert said.err == ""
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
    # The same again changes nothing, other settings are refused, and fewer tasks give the same documents.
    before = (tmp_path / "out").stat().st_mtime_ns
    assert tool(source, "--output", tmp_path / "out", *STAGES, "--workers", 2, "--tasks", 3) == 0
    assert (tmp_path / "out").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other inputs or settings"):
        tool(source, "--output", tmp_path / "out", "--exact", "--tasks", 3)
    assert tool(source, "--output", tmp_path / "one", *STAGES, "--workers", 1, "--tasks", 1) == 0
    assert read_output(tmp_path / "one") == kept


def test_every_stage_has_its_flag(tool, tmp_path):
    rng = random.Random(3)
    texts = [prose(rng, 15) for _ in range(4)]
    stolen = sentence(rng).rstrip(".")
    records = [
        {"body": texts[0].replace("\n", "\r\n")},
        {"body": texts[1] + " Foo bar."},
        {"body": f"{texts[2]} {stolen.upper()}."},
        {"body": texts[3] + " caf\u00c3\u00a9 jo@mail.org", "set": "code"},
        {"body": " ".join(nonsense(rng, 80))},
    ]
    source = write_lines(tmp_path / "in.jsonl", records)
    (tmp_path / "evals").mkdir()
    write_lines(tmp_path / "evals" / "quiz.jsonl", [{"question": stolen}])
    (tmp_path / "list").write_text("foo BAR\n")
    flags = ["--text-key", "body", "--normalise", "--ftfy", "--lang", "en", "--lang-backend", "stopwords", "--pii", "mask"]
    flags += ["--code-where", "set=code", "--decontaminate", tmp_path / "evals", "--blocklist", tmp_path / "list"]
    assert tool(source, "--output", tmp_path / "out", *flags, "--workers", 1, "--tasks", 1) == 0
    kept = read_output(tmp_path / "out")
    assert kept == [{"body": texts[0]}, {"body": texts[3] + " caf\xe9 jo@mail.org", "set": "code"}]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"blocklist/entry": 1, "decontaminate/13 words": 1, "language/unknown": 1}
    assert report["input"] == {"files": 1, "bytes": source.stat().st_size, "documents": 5, "bad_records": {"count": 0, "examples": []}}
    assert report["settings"]["evaluation"] == {"tasks": ["quiz"], "texts": 1, "too short to be found": 0}
    assert report["settings"]["seed"] == 1


def kill_at(command, work, files):
    """Kill a process when its work folder holds so many files. (whether it was killed, the most files seen)"""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, sum(len(names) for _, _, names in os.walk(work)))
        if most >= files:
            # The process alone: its workers may still be at their task when the next run begins.
            process.kill()
            process.wait()
            return True, most
    return False, most


@pytest.mark.parametrize("form", ["jsonl.gz", *(pytest.param(form, marks=pytest.mark.full) for form in ("jsonl", "parquet"))])
def test_killed_with_two_workers_and_started_again(form, script, tool, tmp_path, caplog):
    """Killed when the first two jobs are done; the bytes are those of one worker that was left alone."""
    source = corpus(tmp_path, 24)
    arguments = [str(source), *STAGES, "--tasks", "3", "--format", form]
    assert tool(*arguments, "--output", tmp_path / "whole", "--workers", 1) == 0
    again = [*arguments, "--output", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen([sys.executable, str(script), *again], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("exact-find"):
            break
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.part" / "exact").rglob("*.npy"))) == 3 + 3 + 16
    again[-1] = "1"
    with caplog.at_level("INFO"):
        assert tool(*again) == 0
    assert "continuing what a stopped run left" in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.part").exists()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_killed_at_any_moment(script, tool, tmp_path):
    source = corpus(tmp_path, 40)
    rng = random.Random(1)
    arguments = [str(source), *STAGES, "--tasks", "4"]

    def command(name, workers):
        return [*arguments, "--output", str(tmp_path / name), "--workers", str(workers)]

    killed, most = kill_at([sys.executable, str(script), *command("whole", 2)], tmp_path / "whole.part", 10**6)
    assert not killed
    for turn in range(20):
        again = command(f"out{turn}", turn % 2 + 1)
        work, output = tmp_path / f"out{turn}.part", tmp_path / f"out{turn}"
        killed += kill_at([sys.executable, str(script), *again], work, rng.randint(1, most))[0]
        assert not output.exists() or (output / "report.json").exists()
        assert tool(*again) == 0
        assert contents(output) == contents(tmp_path / "whole")
        assert not work.exists()
    assert killed >= 15


def test_parquet_in_and_out(tool, tmp_path):
    rows = [{"n": at, "text": f"text {at // 2}", "tags": ["a"] * at, "score": None if at < 3 else 0.5} for at in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert tool(tmp_path / "in.parquet", "--output", tmp_path / "out", "--exact", "--format", "parquet", "--tasks", 2, "--workers", 1) == 0
    assert read_output(tmp_path / "out") == rows[::2]


def test_a_bad_record(script, tool, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": \n')
    arguments = [str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--pii", "mask", "--workers", "1"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 77
    assert re.search(r"in.jsonl( from byte 14:1|:2)", done.stderr) and "--skip-bad" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert tool(*arguments, "--skip-bad", 1) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["input"]["bad_records"]["count"] == 1


def test_a_full_disk_is_said(tmp_path):
    def fill(jobs, work):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="no room"):
        clean([str(tmp_path / "in.jsonl")], tmp_path / "out", CleaningSettings(), fill)


def test_two_runs_at_once_are_refused(tool, tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "out.part" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another run"):
            tool(tmp_path / "in.jsonl", "--output", tmp_path / "out", "--workers", 1)
        other.communicate("\n")


SBATCH = """#!/bin/sh
count=$(ls {folder} | wc -l)
echo "$@" > {folder}/$count.arguments
echo "Submitted batch job $((100 + count))"
"""
JOBS = {"exact-read": 3, "exact-find": 16, "near-sign": 3, "near-pair": 14, "near-choose": 1, "write": 3, "publish": 1}


@pytest.fixture
def submitted(tool, tmp_path, monkeypatch):
    """Folder of a run that was handed to a stand-in for sbatch, which writes down its arguments."""
    for name in ("bin", "jobs"):
        (tmp_path / name).mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(folder=tmp_path / "jobs"))
    sbatch.chmod(0o755)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho here\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    asked = ["--executor", "slurm", "--partition", "cpu", "--time", "01:00:00", "--sbatch", "account=a5k", "--tasks", 3]
    assert tool(corpus(tmp_path, 16), "--output", tmp_path / "out", *STAGES, *asked) == 0
    assert not (tmp_path / "out").exists()
    return tmp_path


def test_slurm_scripts(submitted):
    for number, (name, tasks) in enumerate(JOBS.items()):
        script = (submitted / "out.part" / "logs" / f"{number}-{name}" / "launch_script.slurm").read_text()
        asked = ("partition=cpu", "time=01:00:00", "account=a5k", f"array=0-{tasks - 1}", "cpus-per-task=1", "mem-per-cpu=4G")
        assert [line for line in asked if f"#SBATCH --{line}\n" not in script] == []
        assert f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH=" in script
        assert f"launch_pickled_pipeline {submitted}/out.part/logs/{number}-{name}/executor.pik" in script
    calls = [path.read_text() for path in sorted((submitted / "jobs").iterdir(), key=lambda path: int(path.stem))]
    # Every job is followed by one that adds up its statistics, hence every second number.
    assert [line.split("=")[-1].split()[0] for line in calls if "--dependency" in line] == [f"afterok:{100 + 2 * at}" for at in range(6)]


@pytest.mark.full
def test_slurm_tasks_do_the_work(submitted, tool, monkeypatch):
    """Each task of each array as Slurm would start it, in a fresh process."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("SLURM_NODELIST", "here")
    for number, (name, tasks) in enumerate(JOBS.items()):
        pickled = submitted / "out.part" / "logs" / f"{number}-{name}" / "executor.pik"
        for task in range(tasks):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            subprocess.run([Path(sys.executable).parent / "launch_pickled_pipeline", pickled], check=True, capture_output=True, timeout=60)
    assert tool(submitted / "in.jsonl", "--output", submitted / "local", *STAGES, "--tasks", 3, "--workers", 1) == 0
    assert contents(submitted / "out") == contents(submitted / "local")


def test_slurm_needs_sbatch(tool, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = [tmp_path / "in.jsonl", "--output", tmp_path / "out", "--executor", "slurm"]
    with pytest.raises(ConfigError, match="partition"):
        tool(*arguments)
    with pytest.raises(BackendError, match="sbatch is not on this machine"):
        tool(*arguments, "--partition", "cpu", "--time", "1:00:00")


def test_nonsense_is_refused(tool, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    for flags in (
        ["--filters", "gofer"],
        ["--lang", "en"],  # fastText is not installed
        ["--lang", "xx", "--lang-backend", "stopwords"],
        ["--near", "minhash", "--rows", "0"],
        ["--near", "minhash", "--jaccard", "2"],
        ["--ftfy"],
        ["--tasks", "0"],
        ["--workers", "0"],
    ):
        with pytest.raises(NeoXError) as error:
            tool(tmp_path / "in.jsonl", "--output", tmp_path / "out", *flags)
        assert error.value.fix, flags
