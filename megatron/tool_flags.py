# SPDX-License-Identifier: Apache-2.0
"""What command-line tools share: an argparse that raises ConfigError and names the nearest right flag, and settings for one process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from megatron.errors import ConfigError

WHERE = "command line"


class ToolParser(argparse.ArgumentParser):
    """Raises ConfigError instead of leaving with status 2."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # overloads
        """The values. An unknown flag is told before the required ones that are then missing."""
        for word in args or ():
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and not self._known(name):
                near = get_close_matches(name, self._option_string_actions, n=1)
                fix = f"is {near[0]} meant? " if near else ""
                raise ConfigError(f"unknown flag {name}", where=WHERE, fix=f"{fix}--help shows all flags")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """A missing flag or a value that cannot be used."""
        raise ConfigError(message, where=WHERE, fix="--help shows all flags")

    def _known(self, name: str) -> bool:
        known = self._option_string_actions
        return name in known or (self.allow_abbrev and any(flag.startswith(name) for flag in known))


# What training wanted and reading does not. FORMAT: as the reference sets them for generation.
READING: dict[str, Any] = {"checkpoint_activations": False, "partition_activations": False, "no_load_optim": True}

ALONE: dict[str, Any] = {
    **READING,
    "global_num_gpus": 1,
    "pipe_parallel_size": 0,
    "model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
}
