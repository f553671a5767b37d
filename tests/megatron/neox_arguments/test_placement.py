# SPDX-License-Identifier: Apache-2.0
"""Counting of ranks from hostfile, environment and devices."""

from __future__ import annotations

import pytest

from megatron.launch.environment import visible_devices
from megatron.neox_arguments.placement import HostError, Hosts, count_ranks, parse_hostfile

HOSTS = "# cluster\nnode-1 slots=4\nnode-2 slots=4  # second\n\nnode-3 slots=2\n"


@pytest.mark.parametrize(
    ("choice", "ranks"),
    [
        ({}, 10),
        ({"num_nodes": 2}, 8),
        ({"num_gpus": 2}, 6),
        ({"num_nodes": 2, "num_gpus": 1}, 2),
        ({"include": "node-2"}, 4),
        ({"include": "node-1:0,2@node-3"}, 4),
        ({"exclude": "node-1"}, 6),
        ({"exclude": "node-1:0@node-3"}, 7),
        ({"include": "node-2:1", "num_gpus": 4}, 1),
    ],
)
def test_hostfile_and_filters(tmp_path, choice, ranks):
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    assert count_ranks(Hosts(hostfile=str(path), **choice), {}, devices=8)[0] == ranks
    assert count_ranks(Hosts(**choice), {"DLTS_HOSTFILE": str(path), "WORLD_SIZE": "3"}, devices=8)[0] == ranks


@pytest.mark.parametrize(
    "choice", [{"include": "node-9"}, {"include": "node-1:7"}, {"exclude": "a:x"}, {"exclude": "node-1@node-2@node-3"}, {"num_nodes": 4}]
)
def test_filters_that_leave_nothing_or_name_nobody(tmp_path, choice):
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    with pytest.raises(HostError):
        count_ranks(Hosts(hostfile=str(path), **choice), {}, devices=0)


@pytest.mark.parametrize("text", ["", "node-1", "node-1 slots=x", "a slots=1\na slots=1", "a slots=0"])
def test_damaged_hostfiles(text):
    with pytest.raises(HostError):
        parse_hostfile(text)


def test_without_a_hostfile():
    assert count_ranks(Hosts(), {}, devices=0)[0] == 1
    assert count_ranks(Hosts(), {}, devices=4)[0] == 4
    assert count_ranks(Hosts(num_gpus=2), {}, devices=4)[0] == 2
    assert count_ranks(Hosts(), {"WORLD_SIZE": "6"}, devices=4)[0] == 6
    assert count_ranks(Hosts(), {"SLURM_NTASKS": "8"}, devices=4)[0] == 4
    assert count_ranks(Hosts(slurm=True), {"SLURM_NTASKS": "8"}, devices=4)[0] == 8
    assert count_ranks(Hosts(slurm=True), {"SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "4"}, devices=4)[0] == 12


def test_visible_devices(tmp_path):
    assert visible_devices({}, tmp_path / "absent") == 0
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    chosen = {"0,1": 2, "": 0, "-1": 0, "2": 1, "0,-1,1": 1, "GPU-aa,GPU-bb": 2, "0,1,2,3,4": 3, "MIG-a,MIG-b,MIG-c,MIG-d": 4}
    assert visible_devices({}, tmp_path) == 3
    assert {text: visible_devices({"CUDA_VISIBLE_DEVICES": text}, tmp_path) for text in chosen} == chosen
