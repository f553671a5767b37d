# SPDX-License-Identifier: Apache-2.0
"""Rank-aware logging: the only place that decides which rank speaks."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

ROOT = "megatron"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass `__name__`."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


class _RankZero(logging.Filter):
    """Lets warnings of every rank pass, and everything else of rank 0 only."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self.rank == 0 or record.levelno >= logging.WARNING


def setup_logging(*, rank: int | None = None, level: str | None = None, stream: TextIO | None = None) -> None:
    """Send this project's log lines to `stream` (stdout), bare, rank 0 only below WARNING.

    rank:  global rank; by default taken from RANK
    level: by default LOGLEVEL, else INFO
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    handler.addFilter(_RankZero(rank))
    logger.addHandler(handler)
    logger.setLevel((level or os.environ.get("LOGLEVEL") or "INFO").upper())
    logger.propagate = False
