# SPDX-License-Identifier: Apache-2.0
"""The ten sections of the configuration and, read from them, which key is where."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from .base import Section, accepts_null, allowed
from .data import DataArgs, ObjectiveArgs
from .model import AttentionArgs, ModelArgs
from .optim import OptimArgs
from .outputs import CheckpointArgs, LogsArgs
from .run import RunArgs, RuntimeArgs, TextArgs

SECTIONS: Final = MappingProxyType[str, type[Section]](
    {
        "runtime": RuntimeArgs,
        "model": ModelArgs,
        "attention": AttentionArgs,
        "optim": OptimArgs,
        "run": RunArgs,
        "data": DataArgs,
        "objective": ObjectiveArgs,
        "checkpoint": CheckpointArgs,
        "logs": LogsArgs,
        "text": TextArgs,
    }
)
SECTION_OF: Final = MappingProxyType[str, str]({key: name for name, section in SECTIONS.items() for key in section.model_fields})

__all__ = ["SECTIONS", "SECTION_OF", "Section", "accepts_null", "allowed"]
