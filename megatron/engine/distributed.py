# SPDX-License-Identifier: Apache-2.0
"""Starts this process as one rank of the job: who am I, where do we meet, on which device."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron import deepspeed_private as private
from megatron.errors import BackendError, ConfigError, LostRankError
from megatron.launch.environment import Rendezvous
from megatron.log import get_logger
from megatron.mpu.comm import open_groups
from megatron.mpu.groups import Groups, Topology

log = get_logger(__name__)


def choose_device(local_rank: int) -> torch.device:
    """The CUDA device of this local rank where CUDA is, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    keep_freed_memory()
    return torch.device("cpu")


def start(place: Rendezvous, device: torch.device, *, sequence: bool = False, timeout_minutes: float = 30.0, **sizes: int) -> Groups:
    """Join the job through DeepSpeed and return this rank's groups.

    sequence: tensor ranks split the sequence, too
    sizes:    of the axes beside data parallelism: pipe, tensor, context

    Raises ConfigError when the job's processes cannot be shared out so.
    """
    topology = Topology.of_world(place.world_size, **sizes)
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port or _default_port(place)),
    )
    _prepare_deepspeed(device)
    import deepspeed

    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
    return open_groups(topology, place.rank, sequence=sequence)


# What gloo and NCCL say when the other end of a connection is gone or silent.
_BROKEN = re.compile(
    r"connection (closed|reset) by peer|connection was likely closed|broken pipe|timed out waiting|remote process exited", re.IGNORECASE
)


# What the meeting point says to its host when another program listens at its port.
_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Within, a collective that breaks because another rank is gone raises LostRankError, not the transport's own error.

    So does a meeting that a rank never came to; one that cannot be held because its port is taken is a ConfigError.
    """
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, dist.DistNetworkError) and _TAKEN.search(str(error)):
            where = f"MASTER_PORT {os.environ.get('MASTER_PORT', '')}"
            raise ConfigError("the port where ranks meet is in use", where=where, fix="choose another master_port") from error
        if not (isinstance(error, dist.DistError) or _BROKEN.search(str(error))):
            raise
        fix = "see what that rank reported, and its host's log; a rank without any report was killed (out of memory?)"
        raise LostRankError(f"lost another rank: {reason}", fix=fix) from error


def stop(*, failed: bool = False) -> None:
    """Leave the job.

    failed: this rank ends by an error. gloo's threads must end all the same, or they can abort the process at its end; NCCL, which
            would wait for ranks that may be gone, is left as it is.
    """
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def _default_port(place: Rendezvous) -> int:
    if place.world_size > 1:
        return 29500
    # A lone process needs no agreed port, and a fixed one would clash with a neighbour on the same host.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back to the kernel; nothing happens where there is no glibc.

    A training step frees and takes the same large blocks again and again, and fresh pages cost the kernel more than many a product.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in _MALLOPT:
        mallopt(option, value)


# malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX (0 = all from the heap)
_MALLOPT = ((-1, 2**31 - 1), (-4, 0))


def _prepare_deepspeed(device: torch.device) -> None:
    """Set up DeepSpeed for the device: no compilation at start-up, no chatter below WARNING."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.DEBUG if log.isEnabledFor(logging.DEBUG) else logging.WARNING)
    # Collectives that DeepSpeed calls by their old names; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise BackendError("deepspeed is not installed", where=str(error), fix="run setup_uv_env.sh") from error
    private.configure_start(device)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
