# SPDX-License-Identifier: Apache-2.0
"""Keys that a user set and that do nothing: in general, or beside the others. Reports them, changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .sections import SECTIONS
from .sections.run import RunArgs
from .sections.runtime import RuntimeArgs

# Single key -> the entry of the activation_checkpointing block that replaces it.
RECOMPUTE_ENTRIES: Final = {"partition_activations": "partition_activations", "checkpoint_in_cpu": "cpu_checkpointing"}
# What only refines checkpoint_activations.
_RECOMPUTE: Final = ("checkpoint_num_layers", "checkpoint_granularity", *RECOMPUTE_ENTRIES)

NO_EFFECT_KEYS: Final[Mapping[str, Any]] = {
    key: info.default
    for section in SECTIONS.values()
    for key, info in section.model_fields.items()
    if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("effect") == "none"
}


def idle_keys(given: Mapping[str, Any], run: RunArgs, runtime: RuntimeArgs) -> tuple[str, ...]:
    """Names of keys and of a block's entries, in the user's order.

    Beside those that never do anything: refinements of recomputation where nothing is recomputed, and `sequence_parallel` where there
    are no tensor ranks to share a sequence.
    given: keys the user set, as set; run, runtime: these sections, resolved
    """
    always = [key for key, value in given.items() if key in NO_EFFECT_KEYS and value != NO_EFFECT_KEYS[key]]
    alone = ["sequence_parallel"] if given.get("sequence_parallel") and runtime.model_parallel_size == 1 else []
    return (*always, *alone, *_idle_recompute(given, run))


def _idle_recompute(given: Mapping[str, Any], run: RunArgs) -> Iterator[str]:
    block = given.get("activation_checkpointing")
    yield from (f"activation_checkpointing.{entry}" for entry, value in (block or {}).items() if value and _entry_is_idle(entry, run))
    for key in _RECOMPUTE:
        if key not in given:
            continue
        replaced = block is not None and key in RECOMPUTE_ENTRIES and given[key] != getattr(run, key)
        if replaced or (not run.checkpoint_activations and getattr(run, key) != RunArgs.model_fields[key].default):
            yield key


def _entry_is_idle(entry: str, run: RunArgs) -> bool:
    return not run.checkpoint_activations or entry not in RECOMPUTE_ENTRIES.values()
