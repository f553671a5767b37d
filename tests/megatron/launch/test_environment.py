# SPDX-License-Identifier: Apache-2.0
"""Which variables travel, what a rank is told, and what is never shown."""

from __future__ import annotations

from megatron.launch.environment import Seat, handed_on, machine_environment
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
    seat = Seat(rank=5, local_rank=1, world_size=8, local_size=4, master_addr="a", master_port=1, node=1, nodes=2).environment()
    assert (seat["RANK"], seat["LOCAL_RANK"], seat["WORLD_SIZE"], seat["LOCAL_SIZE"], seat["CROSS_RANK"]) == ("5", "1", "8", "4", "1")
    assert machine_environment({"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cuda"}, 2) == {}
    assert machine_environment({"SLURM_CPUS_PER_TASK": "7", "DS_ACCELERATOR": "cuda"}, 2) == {"OMP_NUM_THREADS": "7"}
    assert int(machine_environment({}, 10**6)["OMP_NUM_THREADS"]) == 1
