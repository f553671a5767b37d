# SPDX-License-Identifier: Apache-2.0
"""preprocess_data.py killed, out of disk, or out of input: the same bytes afterwards, and nothing left about."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.tree import ROOT

TOOL = ROOT / "tools" / "datasets" / "preprocess_data.py"
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer" / "tokenizer.json"
# As the tool, but in small blocks, with a record of progress after every one.
OFTEN = f"""
import runpy, sys
import megatron.data.preprocess.resumable_output as partial, megatron.data.preprocess.sources as sources
partial.RECORD_EVERY_S = 0.0
sources.BLOCK_BYTES = 30_000
sys.argv = [{str(TOOL)!r}, *sys.argv[1:]]
if __name__ == "__main__":
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def corpus(folder: Path, documents: int) -> Path:
    path = folder / "in.jsonl"
    rng = random.Random(0)
    words = [line.split()[0] for line in (ROOT / "README.md").read_text().splitlines() if line.split()]
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(rng.choices(words, k=rng.randrange(2000))) if number % 50 else ""
            file.write(json.dumps({"text": text}) + "\n")
    return path


def command(driver: Path, source: Path, prefix: Path, workers: int) -> list[str]:
    flags = ["--input", source, "--tokenizer-type", "HFTokenizer", "--vocab-file", TOKENIZER, "--append-eod", "--tokenizer-backend", "hf"]
    return [sys.executable, str(driver), *map(str, flags), "--output-prefix", str(prefix), "--workers", str(workers)]


def digests(prefix: Path) -> list[str]:
    return [hashlib.sha256(Path(f"{prefix}_text_document.{ending}").read_bytes()).hexdigest() for ending in ("bin", "idx")]


def names(prefix: Path) -> list[str]:
    return sorted(path.name.removeprefix(prefix.name) for path in prefix.parent.iterdir() if path.name.startswith(prefix.name))


def all_end(pids: list[str], within_s: float = 20.0) -> bool:
    """Whether the processes end by themselves."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" for pid in pids):
            return True
        time.sleep(0.05)
    return False


WHOLE = ["_metadata.json", "_text_document.bin", "_text_document.idx"]


@pytest.mark.parametrize(
    ("kills", "workers", "seed"),
    [(3, 2, 0), pytest.param(20, 2, 1, marks=pytest.mark.full), pytest.param(20, 1, 2, marks=pytest.mark.full)],
)
@pytest.mark.timeout(600)
def test_killed_at_any_moment(tmp_path: Path, kills: int, workers: int, seed: int) -> None:
    driver = tmp_path / "often.py"
    driver.write_text(OFTEN)
    source = corpus(tmp_path, 250)
    started = time.monotonic()
    subprocess.run(command(driver, source, tmp_path / "whole", workers), check=True, capture_output=True)
    took = time.monotonic() - started
    rng = random.Random(seed)
    killed = went_on = 0
    (tmp_path / "out").mkdir()
    killed_prefix = tmp_path / "out" / "killed"
    while killed < kills:
        process = subprocess.Popen(
            command(driver, source, killed_prefix, workers), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            process.wait(rng.uniform(0.1, took))
        except subprocess.TimeoutExpired:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.send_signal(signal.SIGKILL)
            killed += 1
            assert all_end(children), "an encoding process outlived the run"
        went_on += "going on with" in process.communicate()[0]
        if (tmp_path / "out" / "killed_text_document.idx").exists():
            assert digests(killed_prefix) == digests(tmp_path / "whole"), "whatever bears the final name is whole"
    done = subprocess.run(command(driver, source, killed_prefix, workers), check=True, capture_output=True, text=True)
    assert went_on or "going on with" in done.stdout, "no run was taken up again: the kills came too early"
    assert digests(killed_prefix) == digests(tmp_path / "whole")
    assert names(killed_prefix) == WHOLE


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_says_how_it_goes_on(tmp_path: Path, workers: int) -> None:
    driver = tmp_path / "often.py"
    driver.write_text(OFTEN)
    source = corpus(tmp_path, 1500)
    (tmp_path / "out").mkdir()
    prefix = tmp_path / "out" / "ds"
    process = subprocess.Popen(
        command(driver, source, prefix, workers), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (prefix.parent / "ds.partial" / "journal.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal asks the encoding processes, too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"stopped: the same command goes on from {prefix}.partial" in out
    done = subprocess.run(command(driver, source, prefix, workers), check=True, capture_output=True, text=True)
    assert "going on with" in done.stdout and names(prefix) == WHOLE


def test_a_full_disk(tmp_path: Path) -> None:
    source = corpus(tmp_path, 300)
    driver = tmp_path / "often.py"
    driver.write_text(OFTEN)
    subprocess.run(command(driver, source, tmp_path / "whole", 1), check=True, capture_output=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    run = " ".join(f"'{part}'" for part in command(driver, source, disk / "ds", 1))
    # A file system of our own, which only this script sees: full at first, then with room.
    script = (
        f"mount -t tmpfs -o size=400k tmpfs '{disk}' || exit 99; {run}; echo status $?; ls '{disk}' | sed 's/^/LEFT /';"
        f" mount -o remount,size=20m '{disk}'; {run}; echo status $?; ls '{disk}' | sed 's/^/THEN /'; sha256sum '{disk}'/ds_text_document.*"
    )
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert "the disk is full" in done.stderr and "free some space" in done.stderr and "Traceback" not in done.stderr
    assert [line for line in lines if line.startswith("status")] == ["status 77", "status 0"]
    assert [line for line in lines if line.startswith("LEFT")] == ["LEFT ds.partial"], "nothing under a final name"
    assert any("going on with" in line for line in lines)
    assert [line for line in lines if line.startswith("THEN")] == [f"THEN ds{name}" for name in WHOLE]
    assert [line.split()[0] for line in lines if line.endswith((".bin", ".idx")) and not line.startswith(("THEN", "wrote"))] == digests(
        tmp_path / "whole"
    )


def test_bad_input_is_told_in_one_report(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"body": "b"}\n{broken\n')
    run = command(TOOL, source, tmp_path / "ds", 2)
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "LOGLEVEL": "INFO"})
    assert done.returncode == 77 and "Traceback" not in done.stderr
    assert f"{source}:2: no text under 'text' (found: body)" in done.stderr and f"{source}:3: not JSON" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    done = subprocess.run([*run, "--skip-bad", "2"], capture_output=True, text=True)
    assert done.returncode == 0 and "left out 2 that cannot be used" in done.stdout
    facts = json.loads((tmp_path / "ds_metadata.json").read_text())
    assert (facts["bad_records"], facts["total_documents"]) == (2, 1)
