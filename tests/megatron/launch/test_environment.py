# SPDX-License-Identifier: Apache-2.0
"""Which variables travel, what a rank is told, and what is never shown."""

from __future__ import annotations

import doctest

import pytest

from megatron.errors import ConfigError
from megatron.launch import environment
from megatron.launch.environment import Rendezvous, expand, handed_on, machine_environment, place_from
from megatron.secrets import mask, redact


def test_programs_travel_and_machines_do_not() -> None:
    kept = {
        "PATH": "/bin",
        "PYTHONPATH": "x",
        "TORCH_EXTENSIONS_DIR": "t",
        "OMP_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "e",
        "HF_HOME": "h",
    }
    left = {"HOME": "/root", "TMPDIR": "/t", "HOSTNAME": "a", "RANK": "3", "SLURM_PROCID": "0", "CUDA_VISIBLE_DEVICES": "1"}
    assert handed_on({**kept, **left, "NEOX_FAILURE_FILE": "f", "NEOX_LAUNCH_SECRET": "s"}) == kept


def test_secrets_are_masked_by_name_and_redacted_by_value() -> None:
    assert mask("MY_API_KEY", "x") == mask("HF_TOKEN", "x") == mask("AWS_SECRET_ACCESS_KEY", "x") == "***"
    assert mask("TOKENIZERS_PARALLELISM", "false") == "false"
    assert redact("token abcdefg, short ab", {"HF_TOKEN": "abcdefg", "MY_PASSWORD": "ab", "NAME": "token"}) == "token ***, short ab"


def test_a_rank_is_told_its_seat_and_its_share_of_the_machine() -> None:
    seat = Rendezvous(rank=5, local_rank=1, world_size=8, local_size=4, master_addr="a", master_port=1, node=1, nodes=2).environment()
    assert (seat["RANK"], seat["LOCAL_RANK"], seat["WORLD_SIZE"], seat["LOCAL_SIZE"], seat["CROSS_RANK"]) == ("5", "1", "8", "4", "1")
    assert machine_environment({"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cuda"}, 2) == {}
    assert machine_environment({"SLURM_CPUS_PER_TASK": "7", "DS_ACCELERATOR": "cuda"}, 2) == {"OMP_NUM_THREADS": "7"}
    assert int(machine_environment({}, 10**6)["OMP_NUM_THREADS"]) == 1


SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "nid[002-003]",
    "SLURM_JOB_NODELIST": "nid[001-003]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
MPICH = {"PMI_RANK": "3", "MPI_LOCALRANKID": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"}


def test_each_start_is_understood() -> None:
    assert place_from({}) == Rendezvous()
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    assert place_from(torchrun) == Rendezvous(rank=3, local_rank=1, world_size=4, master_addr="a", master_port=9)
    found = place_from(SRUN)
    assert (found.rank, found.local_rank, found.world_size, found.master_addr) == (5, 1, 8, "nid002")
    found = place_from({**OPENMPI, "MASTER_ADDR": "b"})
    assert (found.rank, found.local_rank, found.world_size, found.master_addr) == (1, 0, 2, "b")
    found = place_from(MPICH)
    assert (found.rank, found.local_rank, found.world_size, found.master_addr) == (3, 3, 4, "127.0.0.1")
    # A launcher's own words win over those of the srun or mpirun that it used.
    assert place_from({**SRUN, **OPENMPI, **torchrun}) == place_from(torchrun)
    assert place_from({**SRUN, **OPENMPI, "MASTER_ADDR": "b"}).world_size == 2
    # A batch script is no rank of anything, though SLURM_PROCID is set in it.
    assert place_from({name: value for name, value in SRUN.items() if "STEP" not in name}) == Rendezvous()


def test_all_ranks_derive_the_same_port() -> None:
    ports = {place_from({**SRUN, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}).master_port for rank in range(8)}
    assert len(ports) == 1 and 20000 <= (ports.pop() or 0) < 40000
    assert place_from({**SRUN, "SLURM_JOB_ID": "1234568"}).master_port != place_from(SRUN).master_port
    assert place_from({**SRUN, "MASTER_PORT": "1", "MASTER_ADDR": "x"}) == Rendezvous(
        rank=5, local_rank=1, world_size=8, master_addr="x", master_port=1
    )
    assert place_from(MPICH).master_port == place_from({**MPICH, "PMI_RANK": "0"}).master_port is not None


def test_what_the_configuration_says_is_held_to() -> None:
    assert place_from(SRUN, slurm=True).rank == 5
    assert place_from({**MPICH, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, mpi=True).rank == 3
    for flags, name in (({"slurm": True}, "SLURM_PROCID"), ({"mpi": True}, "OMPI_COMM_WORLD_RANK")):
        with pytest.raises(ConfigError, match=name):
            place_from({}, **flags)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="no common address"):
        place_from(OPENMPI)
    with pytest.raises(ConfigError, match="not a number"):
        place_from({"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"})


def test_node_lists() -> None:
    assert doctest.testmod(environment).failed == 0
    assert expand("login1") == ["login1"]
    assert expand("a[9-11]") == ["a9", "a10", "a11"]
    for damaged in ("", "n[1-2", "n]1[", "n[2-1]", "n[a-b]", "n[1-999999999]", "a b", "n[1][", ","):
        with pytest.raises(ConfigError, match="node list"):
            expand(damaged)
