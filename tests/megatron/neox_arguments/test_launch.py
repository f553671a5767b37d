# SPDX-License-Identifier: Apache-2.0
"""From keys and hostfile to the plan of a launch: argument lists per launcher, environment, and what is refused."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launch.commands import LaunchPlan
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.launch import plan_launch
from megatron.neox_arguments.placement import is_here

QUICKSTART = str(Path(__file__).resolve().parents[3] / "configs" / "quickstart.yml")
SCRIPT = "train 'it'; $(touch pwned).py"
SECRETS = {"WANDB_API_KEY": "s3cret-1", "HF_TOKEN": "s3cret-2"}
ENVIRON = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "HOME": "/nowhere", "DISPLAY": ":0", **SECRETS}


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WORLD_SIZE", "DLTS_HOSTFILE", "SLURM_NTASKS", "SLURM_JOB_ID", "DS_ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("hosta slots=2\nhostb slots=2\n")
    return str(path)


def plan(environ: dict[str, str] | None = None, script: str = SCRIPT, **keys: object) -> LaunchPlan:
    args = NeoXArgs.from_ymls([QUICKSTART], overwrites=keys)
    return plan_launch(args, script, ["--x", "a b"], ENVIRON if environ is None else environ)


def value_after(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich"])
def test_every_launcher_gets_an_argument_list_without_secrets(hosts: str, launcher: str) -> None:
    made = plan(hostfile=hosts, launcher=launcher)
    assert made.places() == {0: "hosta", 1: "hosta", 2: "hostb", 3: "hostb"}
    assert (made.master_addr, made.master_port) == ("hosta", 29500)
    assert made.worker == (sys.executable, "-u", SCRIPT, "--x", "a b")
    text = made.show()
    assert "s3cret" not in text + " ".join(made.argv) + "".join(made.env.values()) + "".join(made.handed_on.values())
    assert {"HF_TOKEN", "WANDB_API_KEY"} <= set(made.secrets)
    assert made.handed_on["NCCL_DEBUG"] == "INFO" and not {"HOME", "DISPLAY"} & set(made.handed_on)
    assert "host      hostb: ranks 2-3" in text and "ranks env NCCL_DEBUG=INFO" in text
    # What is shown can be read back as the very words that are run.
    (shown,) = (line for line in text.splitlines() if line.startswith("run "))
    assert tuple(shlex.split(shown)[1:]) == made.argv
    if launcher == "pdsh":
        assert value_after(made.argv, "-w") == "hosta,hostb" and SCRIPT not in made.argv
    else:
        assert made.argv[-len(made.worker) :] == made.worker
        assert value_after(made.argv, "-n") == "4" and "hosta:2,hostb:2" in made.argv
        names = made.argv if launcher == "openmpi" else value_after(made.argv, "-genvlist").split(",")
        assert {"HF_TOKEN", "NCCL_DEBUG", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"} <= set(names)


def test_filters_addresses_and_ports(hosts: str) -> None:
    made = plan(hostfile=hosts, num_nodes=1, master_addr="10.0.0.1", master_port=1234, launcher="openmpi")
    assert made.places() == {0: "hosta", 1: "hosta"} and (made.master_addr, made.master_port) == ("10.0.0.1", 1234)
    made = plan({**ENVIRON, "MASTER_ADDR": "ib0", "MASTER_PORT": "77"}, hostfile=hosts, include="hostb:1@hosta:0")
    assert made.places() == {0: "hosta", 1: "hostb"} and (made.master_addr, made.master_port) == ("ib0", 77)
    assert made.set_devices and "devices 1" in made.show()
    assert not plan({**ENVIRON, "DS_ACCELERATOR": "cpu"}, hostfile=hosts).set_devices
    assert plan(hostfile=hosts, exclude="hosta").places() == {0: "hostb", 1: "hostb"}
    made = plan({**ENVIRON, "DLTS_HOSTFILE": hosts}, global_num_gpus=4)
    assert made.world_size == 4
    with pytest.raises(ConfigError, match="give 4 ranks, but global_num_gpus is 2"):
        plan(hostfile=hosts, global_num_gpus=2, train_batch_size=8)
    with pytest.raises(ConfigError, match="no host hostc"):
        plan(hostfile=hosts, include="hostc", global_num_gpus=2)


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "^list", "node[1-2]", "a;b", "a,b"])
def test_a_host_name_is_no_flag_and_no_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / "hosts").write_text(f"hosta slots=1\n{name} slots=1\n")
    with pytest.raises(ConfigError, match="not a host name"):
        plan(hostfile=str(tmp_path / "hosts"))


def test_the_environment_file_is_for_all_ranks(hosts: str, tmp_path: Path) -> None:
    extra = tmp_path / "extra env"
    extra.write_text("# for all\nexport MY_FLAG = a b\nNCCL_DEBUG=WARN\nMY_API_KEY=s3cret\n")
    made = plan({**ENVIRON, "DS_ENV_FILE": str(extra)}, hostfile=hosts)
    assert made.handed_on["MY_FLAG"] == "a b" and made.env["NCCL_DEBUG"] == "WARN" == made.handed_on["NCCL_DEBUG"]
    assert "MY_API_KEY" in made.secrets and "s3cret" not in made.show()
    (tmp_path / ".deepspeed_env").write_text("not a variable\n")
    with pytest.raises(ConfigError) as caught:
        plan(hostfile=hosts)
    assert caught.value.where is not None and caught.value.where.endswith(".deepspeed_env:1")
    with pytest.raises(ConfigError, match="does not exist"):
        plan({**ENVIRON, "DS_ENV_FILE": "none"}, hostfile=hosts)


def test_slurm_is_srun_inside_a_job(hosts: str) -> None:
    job = {**ENVIRON, "SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "nid[003-004]"}
    made = plan(job, launcher="slurm", global_num_gpus=4, comment="it's mine", account="a1")
    assert made.argv[0] == "srun" and {"--ntasks=4", "--export=ALL", "--kill-on-bad-exit=1"} < set(made.argv)
    assert {"--comment=it's mine", "--account=a1"} < set(made.argv)
    assert (made.env["MASTER_ADDR"], made.env["MASTER_PORT"]) == ("nid003", "20007")
    assert made.argv[-len(made.worker) :] == made.worker
    made = plan(job, launcher="slurm", deepspeed_slurm=True, hostfile=hosts, num_nodes=1)
    assert {"--ntasks=2", "--nodes=1", "--ntasks-per-node=2", "--nodelist=hosta"} < set(made.argv)
    with pytest.raises(ConfigError, match="first devices"):
        plan(job, launcher="slurm", hostfile=hosts, include="hosta:1@hostb:1")
    with pytest.raises(ConfigError, match="inside a SLURM job"):
        plan(launcher="slurm", hostfile=hosts)


def test_one_host_that_is_this_machine_needs_no_launcher(tmp_path: Path) -> None:
    assert is_here("localhost") and is_here(socket.gethostname()) and is_here("127.0.0.1") and not is_here("192.0.2.1")
    for name in ("localhost", socket.gethostname()):
        (tmp_path / "hosts").write_text(f"{name} slots=2\n")
        made = plan(hostfile=str(tmp_path / "hosts"), launcher="openmpi")
        assert (made.launcher, made.argv, made.world_size) == ("local", (), 2)
    assert plan(hostfile=str(tmp_path / "hosts"), force_multi=True).launcher == "pdsh"
    (tmp_path / "hosts").write_text("192.0.2.1 slots=2\n")
    assert plan(hostfile=str(tmp_path / "hosts")).launcher == "pdsh"


def test_local_means_this_machine_whatever_hostfile_there_is(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTS_HOSTFILE", hosts)
    made = plan({**ENVIRON, "DLTS_HOSTFILE": hosts}, launcher="local")
    assert (made.launcher, made.world_size) == ("local", 1)
    with pytest.raises(ConfigError, match="launcher is local, but hostfile is set"):
        plan(launcher="local", hostfile=hosts)


def test_what_only_deepspeed_knows_goes_through_its_runner(hosts: str) -> None:
    made = plan(hostfile=hosts, launcher="mvapich", no_ssh_check=True, num_nodes=1, master_addr="hosta")
    assert made.argv[:4] == (sys.executable, "-u", "-m", "deepspeed.launcher.runner") and made.argv[-3:] == (SCRIPT, "--x", "a b")
    for flag in (f"--hostfile={hosts}", "--launcher=mvapich", "--master_addr=hosta", "--num_nodes=1", "--no_ssh_check"):
        assert flag in made.argv
    assert "s3cret" not in made.show()
    assert "--autotuning=run" in plan(script="train.py", autotuning_run="run", hostfile=hosts, launcher="openmpi").argv
    with pytest.raises(ConfigError, match="remote shell"):
        plan(autotuning_run="run", hostfile=hosts)


def test_local_devices_are_chosen_and_counted() -> None:
    def slots(environ: dict[str, str], **keys: object) -> tuple[int | str, ...]:
        (host,) = plan(environ, **keys).hosts
        return host.slots

    cpu = {"CUDA_VISIBLE_DEVICES": "", "HOME": os.environ.get("HOME", "/")}
    assert slots(cpu, global_num_gpus=2, include="localhost:1,3") == (1, 3)
    assert slots({"DS_ACCELERATOR": "cpu"}, global_num_gpus=2) == (0, 1)
    with pytest.raises(ConfigError, match="2 ranks are wanted"):
        slots(cpu, global_num_gpus=2, include="localhost:1")
    with pytest.raises(ConfigError, match="not about this machine"):
        slots(cpu, include="elsewhere:1")
    with pytest.raises(ConfigError, match="there is no hostfile"):
        slots(cpu, num_nodes=2)
    assert plan(cpu, master_port=12345).master_port == 12345
    assert plan({**cpu, "MASTER_PORT": "2345"}).master_port == 2345
