# SPDX-License-Identifier: Apache-2.0
"""multinode_prepare_data.sh: parts of the list, flags and places, told by a tool that only writes down how it was called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.tree import ROOT

SCRIPT = ROOT / "tools" / "datasets" / "multinode_prepare_data.sh"
STUB = "import json, os, sys; print(json.dumps([sys.argv[1:], 'RANK' in os.environ]))"
LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_", "OMPI_")


def call(tmp_path: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "stub.py").write_text(STUB)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    env = {**clean, "PYTHON": sys.executable, "TOOL": str(tmp_path / "stub.py"), **environ}
    return subprocess.run(["bash", str(SCRIPT), *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)


def flags_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    words, grouped = json.loads(done.stdout.splitlines()[-1])
    assert not grouped
    return words  # type: ignore[no-any-return]


@pytest.mark.parametrize("world", [1, 3, 4, 7])
def test_parts_follow_each_other_and_miss_nothing(tmp_path: Path, world: int) -> None:
    names = [f"a dir/f{number}.jsonl" for number in range(6)]
    (tmp_path / "list.txt").write_text("\n\n".join(names[:3]) + "\r\n" + "\n".join(names[3:]))  # no newline at the end
    taken = []
    for rank in range(world):
        done = call(tmp_path, "list.txt", "--output-prefix", "out/set", RANK=str(rank), WORLD_SIZE=str(world))
        if "nothing to do" in done.stdout:
            assert done.returncode == 0 and world > 6
            continue
        words = flags_of(done)
        assert words[0] == "--input" and words[2:] == ["--output-prefix", f"out/set_rank{rank}"]
        taken.append(words[1].split(","))
    assert sum(taken, []) == names and max(map(len, taken)) - min(map(len, taken)) <= 1


def test_flags_pass_untouched(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("x.jsonl\n")
    own = ["--append-eod", "--ftfy", "--jsonl-keys", "text", "a b", "--workers", "2", "--append-eod"]
    expected = ["--input", "x.jsonl", "--output-prefix", "p_rank0", *own]
    assert flags_of(call(tmp_path, "list.txt", *own[:2], "--output-prefix", "p", *own[2:])) == expected
    assert flags_of(call(tmp_path, "list.txt", *own, "--output-prefix=p")) == expected
    assert flags_of(call(tmp_path, "list.txt", *own, "--output", "p")) == expected
    assert flags_of(call(tmp_path, "list.txt")) == ["--input", "x.jsonl", "--output-prefix", "rank0"]


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, 2),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, 1),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, 3),
        # the script of an array's job is task 0 of 1
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 2),
        # --array=10-40:10
        (
            {
                "SLURM_ARRAY_TASK_ID": "40",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "10",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            3,
        ),
        # srun with two tasks in each of two jobs
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 3),
    ],
)
def test_places(tmp_path: Path, environ: dict[str, str], rank: int) -> None:
    (tmp_path / "list.txt").write_text("".join(f"f{number}\n" for number in range(4)))
    assert flags_of(call(tmp_path, "list.txt", **environ)) == ["--input", f"f{rank}", "--output-prefix", f"rank{rank}"]


def test_help_and_what_is_refused(tmp_path: Path) -> None:
    assert (done := call(tmp_path, "--help")).returncode == 0 and done.stdout.startswith("usage: ")
    assert (done := call(tmp_path)).returncode == 1 and done.stderr.startswith("usage: ")
    (tmp_path / "list.txt").write_text("a\n")
    (tmp_path / "commas.txt").write_text("a,b\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "long.txt").write_text("".join(f"{'x' * 200}{number}\n" for number in range(1000)))
    for words, environ, said in (
        (["none.txt"], {}, "cannot read the list none.txt"),
        (["commas.txt"], {}, "comma"),
        (["empty.txt"], {}, "names no file"),
        (["long.txt"], {}, "too long"),
        (["--append-eod", "list.txt"], {}, "comes first"),
        (["list.txt", "--input", "b"], {}, "--input is made from"),
        (["list.txt", "--output-prefix"], {}, "needs a value"),
        (["list.txt"], {"RANK": "4", "WORLD_SIZE": "4"}, "makes no sense"),
        (["list.txt"], {"RANK": "1"}, "makes no sense"),
        (["list.txt"], {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7"}, "how many parts"),
    ):
        done = call(tmp_path, *words, **environ)
        assert done.returncode == 1 and said in done.stderr and not done.stdout.startswith("[["), (words, done)
