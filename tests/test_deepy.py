# SPDX-License-Identifier: Apache-2.0
"""The launcher as a user meets it: real processes, a dummy worker instead of training."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.neox_arguments.cli import consume_neox_args

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yml")
# A name no shell would leave in peace.
SCRIPT = "worker 'x'; touch pwned.py"
WORKER = """\
import json, os, signal, sys, time
rank, mode = os.environ["RANK"], os.environ.get("WORKER_MODE", "")
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "DS_ACCELERATOR", "WANDB_API_KEY")
told = {"argv": sys.argv[1:], "env": {name: os.environ.get(name) for name in names}}
def stop(signum, frame):
    open(f"stopped{rank}", "w").write(str(signum))
    sys.exit({"wait": 75, "fail": 75}.get(mode, 0))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL if mode == "deaf" else stop)
with open(f"rank{rank}.tmp", "w") as out:
    json.dump(told, out)
os.rename(f"rank{rank}.tmp", f"rank{rank}.json")
if mode == "fail" and rank == "1":
    sys.exit(7)
if mode == "config error":
    from megatron.errors import ConfigError
    from megatron.neox_arguments.cli import run_face
    def fails(argv):
        raise ConfigError("wrong on the worker")
    sys.exit(run_face(fails, [], usage="", about=""))
if mode == "same error":
    from megatron.errors import DataError
    from megatron.neox_arguments.cli import run_face
    def fails(argv):
        raise DataError("wrong everywhere")
    sys.exit(run_face(fails, [], usage="", about=""))
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("fail", "wait", "finish", "deaf"):
    time.sleep(100)
"""


def environment(mode: str = "", **more: str) -> dict[str, str]:
    dropped = (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "OMP_NUM_THREADS",
        "MASTER_PORT",
        "DLTS_HOSTFILE",
        "DS_ACCELERATOR",
        "CUDA_VISIBLE_DEVICES",
    )
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "WORKER_MODE": mode, **more}


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "deepy.py"), SCRIPT, QUICKSTART, *flags]


def run(folder: Path, *flags: str, mode: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    (folder / SCRIPT).write_text(WORKER)
    return subprocess.run(
        command(*flags), cwd=folder, env=environment(mode, **env), capture_output=True, text=True, timeout=100, check=False
    )


def test_help_and_config_errors_answer_at_once_and_start_nothing(tmp_path: Path) -> None:
    quick = [sys.executable, "-X", "importtime", str(ROOT / "deepy.py"), "--help"]
    begin = time.process_time()
    told = subprocess.run(quick, capture_output=True, text=True, timeout=60, check=True, env=environment())
    assert "--conf_dir" in told.stdout and "explain" in told.stdout
    assert not {"torch", "deepspeed", "numpy"} & {line.rsplit("|", 1)[-1].strip() for line in told.stderr.splitlines()}
    assert time.process_time() - begin < 1
    wrong = run(tmp_path, "--train_batch_size", "7", "--global_num_gpus", "2", "--hiden_size", "3")
    assert (wrong.returncode, wrong.stdout) == (77, "")
    assert "closest: --hidden_size" in wrong.stderr and "Traceback" not in wrong.stderr
    wrong = run(tmp_path, "--num_attention_heads", "5", "--norm", "lyernorm", "--debug")
    assert wrong.returncode == 77
    assert "--norm" in wrong.stderr and "--num_attention_heads" in wrong.stderr and "Traceback" in wrong.stderr
    assert not list(tmp_path.glob("rank*"))


def test_two_ranks_get_their_places_and_the_whole_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, "--global_num_gpus", "2", "--wandb_run_name", "a b; $(touch pwned)", WANDB_API_KEY="s3cret")
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank, worker in enumerate(told):
        env = worker["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert (env["MASTER_ADDR"], env["DS_ACCELERATOR"], env["WANDB_API_KEY"]) == ("127.0.0.1", "cpu", "s3cret")
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert "s3cret" not in " ".join(worker["argv"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = consume_neox_args(told[1]["argv"])
    assert (args.logs.wandb_run_name, args.runtime.global_num_gpus, args.model.hidden_size) == ("a b; $(touch pwned)", 2, 192)
    assert not list(tmp_path.glob("pwned*"))


def test_exit_statuses_of_workers_come_through(tmp_path: Path) -> None:
    failed = run(tmp_path, "--global_num_gpus", "2", mode="fail")
    assert failed.returncode == 7
    assert "exit status 7" in failed.stdout + failed.stderr
    # The other worker was told to stop, and did so in order.
    assert (tmp_path / "stopped0").read_text() == str(int(signal.SIGTERM))
    assert run(tmp_path, mode="config error").returncode == 77
    told_once = run(tmp_path, "--global_num_gpus", "2", mode="same error")
    assert told_once.returncode == 77
    assert told_once.stderr.splitlines()[0].endswith("failed first:") and told_once.stderr.count("wrong everywhere") == 1
    alone = run(tmp_path, mode="same error")
    assert (alone.returncode, alone.stderr) == (77, "wrong everywhere\n")
    killed = run(tmp_path, mode="killed")
    assert killed.returncode == 128 + signal.SIGKILL
    assert "out of memory" in killed.stdout + killed.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_launcher_stops_every_worker(tmp_path: Path, signum: signal.Signals) -> None:
    (tmp_path / SCRIPT).write_text(WORKER)
    process = subprocess.Popen(command("--global_num_gpus", "2"), cwd=tmp_path, env=environment("wait"))
    try:
        await_files(tmp_path, "rank0.json", "rank1.json")
        # The launcher takes its handlers on just after it has started the workers.
        time.sleep(0.5)
        process.send_signal(signum)
        assert process.wait(timeout=60) == (-signal.SIGKILL if signum == signal.SIGKILL else 75)
        await_files(tmp_path, "stopped0", "stopped1")
        # The signal itself, not the launcher's SIGTERM with a SIGKILL after 30 s: a checkpoint may take longer.
        expected = signal.SIGTERM if signum == signal.SIGKILL else signum
        assert {(tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)} == {str(int(expected))}
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("mode", "status"), [("finish", 0), ("deaf", 128 + signal.SIGTERM)])
def test_the_launchers_status_is_what_its_workers_made_of_the_signal(tmp_path: Path, mode: str, status: int) -> None:
    """Workers that finish are done, whatever was asked; those that know no signal end by it."""
    (tmp_path / SCRIPT).write_text(WORKER)
    with subprocess.Popen(command("--global_num_gpus", "2"), cwd=tmp_path, env=environment(mode), stderr=subprocess.PIPE) as process:
        await_files(tmp_path, "rank0.json", "rank1.json")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == status and b"failed" not in told


def await_files(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"no {names}, but {sorted(path.name for path in folder.iterdir())}"
        time.sleep(0.05)


def test_dry_run_shows_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "--global_num_gpus", "2", "--dry-run", WANDB_API_KEY="s3cret", HF_TOKEN="s3cret")
    assert done.returncode == 0 and "s3cret" not in done.stdout + done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["launcher"] == "local" and lines["host"].endswith("ranks 0-1")
    words = shlex.split(lines["each"])
    assert words[1:4] == [sys.executable, "-u", SCRIPT]
    assert not list(tmp_path.glob("rank*"))


# Ranks 0 and 1 wait for each other for ever, and nothing between them breaks when rank 3 fails: only the launcher can end them.
GROUPS = """\
import os, sys
from megatron.neox_arguments.cli import run_face
def main(argv):
    import torch, torch.distributed as dist
    from megatron.engine.distributed import naming_lost_ranks
    rank = int(os.environ["RANK"])
    with naming_lost_ranks():
        dist.init_process_group("gloo")
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        dist.barrier()
        if rank == 3:
            raise ValueError("bad batch")
        value = torch.zeros(1)
        if rank == 2:
            dist.all_reduce(value, group=pairs[1])
        dist.recv(value, src=1 - rank, group=pairs[0])
sys.exit(run_face(main, sys.argv[1:], usage="", about=""))
"""


@pytest.mark.dist
def test_ranks_of_other_groups_do_not_outlive_a_failed_one(tmp_path: Path) -> None:
    (tmp_path / SCRIPT).write_text(GROUPS)
    flags = ("--global_num_gpus", "4", "--train_batch_size", "8")
    begin = time.monotonic()
    done = subprocess.run(command(*flags), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - begin < 60
    first, *rest = done.stderr[done.stderr.index("rank 3 on") :].splitlines()
    assert first.endswith("failed first:") and rest[0].startswith("Traceback") and "ValueError: bad batch" in rest
    # Rank 2 lost its partner, which is told after the cause; 0 and 1 have nothing to tell.
    told = [line for line in rest if line.startswith("then ")]
    assert len(told) == 1 and "rank 2" in told[0] and "lost another rank" in told[0]
    assert not [pid for pid in Path("/proc").glob("[0-9]*/environ") if os.fsencode(str(tmp_path)) in _read(pid)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
