# SPDX-License-Identifier: Apache-2.0
"""Two hosts, in network namespaces of this machine, train together; when one dies, the other ends and says which."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.tiny import tiny
from support.tree import ROOT
from support.two_hosts import TwoHosts, missing

pytestmark = [pytest.mark.full, pytest.mark.dist, pytest.mark.timeout(240)]

LAUNCHERS = [
    pytest.param("pdsh", ["pdsh"], id="pdsh"),
    pytest.param("openmpi", ["mpirun.openmpi"], id="openmpi"),
    pytest.param("mpich", ["mpirun.mpich"], id="mpich"),
]
# A name that no shell would leave in peace.
FOLDER = "it's; $(touch pwned) %h"
SECRET = "hf_neverShownAnywhere"
# What a lost node may take the other one.
LIMIT_S = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder, named awkwardly, with a configuration and its data."""
    made = tmp_path / FOLDER
    made.mkdir()
    for suffix in ("bin", "idx"):
        name = f"corpus_text_document.{suffix}"
        (made / name).write_bytes((ROOT / "tests" / "golden" / "train" / "data" / name).read_bytes())
    flat: dict[str, Any] = tiny("neox", train_iters=4, global_num_gpus=None, train_batch_size=4, gradient_accumulation_steps=None)
    flat |= {f"{split}_data_paths": ["corpus_text_document"] for split in ("train", "valid", "test")}
    flat |= {"vocab_file": str(ROOT / "tests" / "golden" / "tokenizer" / "tokenizer.json")}
    (made / "tiny.yml").write_text(yaml.safe_dump(flat))
    (made / "hosts").write_text("hosta slots=1\nhostb slots=1\n")
    return made


def environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DLTS_HOSTFILE", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET}


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), "tiny.yml", *flags]


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"lm_loss: (\S+)", text)]


def need(*programs: str) -> None:
    reason = missing(*programs)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize(("launcher", "programs"), LAUNCHERS)
def test_two_hosts_train_as_one_process_does(launcher: str, programs: list[str], folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    need(*programs)
    monkeypatch.chdir(folder)
    alone = subprocess.run(command(), env=environment(), capture_output=True, text=True, timeout=100, check=False)
    expected = losses(alone.stdout)
    assert len(expected) == 4, alone.stderr
    with TwoHosts(tmp_path / "net") as hosts:
        flags = ("--hostfile", "hosts", "--launcher", launcher, "--train_micro_batch_size_per_gpu", "2")
        done = hosts.run("hosta", command(*flags), timeout_s=120, env=environment())
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout) == pytest.approx(expected, rel=1e-5)
    assert f"launching 2 ranks on hosta, hostb with {launcher}" in done.stdout
    assert not list(tmp_path.rglob("pwned*"))


@pytest.mark.parametrize(("launcher", "programs"), LAUNCHERS)
@pytest.mark.parametrize("victim", ["host", "rank"])
def test_a_killed_host_or_rank_ends_the_other(
    launcher: str, programs: list[str], victim: str, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    need(*programs)
    monkeypatch.chdir(folder)
    flags = ("--hostfile", "hosts", "--launcher", launcher, "--train_iters", "1000000")
    with TwoHosts(tmp_path / "net") as hosts:
        log, errors = tmp_path / "log", tmp_path / "errors"
        with open(log, "wb") as out, open(errors, "wb") as err:
            process = hosts.start("hosta", command(*flags), env=environment(), stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        try:
            await_line(log, r"iteration +3/", process, errors)
            ranks = workers()
            assert len(ranks) == 2 and not shown_on_command_lines(SECRET)
            begin = time.monotonic()
            if victim == "host":
                hosts.kill("hostb")
            else:
                os.kill(ranks[1], 9)
            status = process.wait(timeout=90)
            took_s = time.monotonic() - begin
        finally:
            process.kill()
            process.wait()
        told = errors.read_text(errors="replace")
        report = told[told.index("rank 1 on hostb") :].splitlines()
        assert report[0] == "rank 1 on hostb failed first:", told
        assert ("lost:" if victim == "host" else "killed by SIGKILL") in report[1]
        assert status == (1 if victim == "host" else 137)
        assert took_s < LIMIT_S
        assert not workers()
        assert SECRET not in told + log.read_text(errors="replace")


def await_line(path: Path, pattern: str, process: subprocess.Popen[str], errors: Path) -> None:
    deadline = time.monotonic() + 100
    while not re.search(pattern, path.read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < deadline, path.read_text()[-2000:] + errors.read_text()
        time.sleep(0.1)


def workers() -> dict[int, int]:
    """{rank: process id} of the training processes, as this machine numbers them; both hosts' are among its own."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"--megatron_config" in words and b"megatron.launch.agent" not in words and b"-u" == words[1]:
                names = dict(item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item)
                if names.get(b"HF_TOKEN") == SECRET.encode() and b"RANK" in names:
                    found[int(names[b"RANK"])] = int(folder.name)
        except (OSError, IndexError):
            continue
    return found


def shown_on_command_lines(text: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False
