# SPDX-License-Identifier: Apache-2.0
"""A collective that breaks because another rank is gone is named so; other errors stay what they are."""

from __future__ import annotations

import pytest

from megatron.errors import LostRankError

GLOO = "[pair.cc:553] Connection closed by peer [127.0.0.1]:24474. This is typically caused by a remote worker crashing."


def test_lost_ranks_are_named() -> None:
    import torch.distributed as dist

    from megatron.engine.distributed import naming_lost_ranks

    for error in (RuntimeError(GLOO), dist.DistBackendError("NCCL error")):
        with pytest.raises(LostRankError, match="lost another rank"), naming_lost_ranks():
            raise error
    with pytest.raises(RuntimeError, match="shapes") as kept, naming_lost_ranks():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(kept.value, LostRankError)
