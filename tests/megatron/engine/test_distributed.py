# SPDX-License-Identifier: Apache-2.0
"""A collective that breaks because another rank is gone is named so; other errors stay what they are."""

from __future__ import annotations

import pytest

from megatron.errors import ConfigError, LostRankError

GLOO = "[pair.cc:553] Connection closed by peer [127.0.0.1]:24474. This is typically caused by a remote worker crashing."


def test_lost_ranks_are_named() -> None:
    import torch.distributed as dist

    from megatron.engine.distributed import naming_lost_ranks

    for error in (RuntimeError(GLOO), dist.DistBackendError("NCCL error"), dist.DistStoreError("wait timeout")):
        with pytest.raises(LostRankError, match="lost another rank"), naming_lost_ranks():
            raise error
    with pytest.raises(RuntimeError, match="shapes") as kept, naming_lost_ranks():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(kept.value, LostRankError)


def test_a_port_in_use_is_no_lost_rank() -> None:
    import socket

    from torch.distributed import TCPStore

    from megatron.engine.distributed import naming_lost_ranks

    with socket.create_server(("", 0)) as taken:
        with pytest.raises(ConfigError, match="port where ranks meet is in use") as caught, naming_lost_ranks():
            TCPStore("127.0.0.1", taken.getsockname()[1], 2, True, wait_for_workers=False)
    assert "master_port" in caught.value.report()


def test_each_start_gives_a_place() -> None:
    from megatron.launch.environment import Rendezvous, place_from

    assert place_from({}) == Rendezvous()
    found = place_from({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[7-8]"})
    assert (found.rank, found.local_rank, found.world_size, found.master_addr) == (1, 1, 2, "n7")
