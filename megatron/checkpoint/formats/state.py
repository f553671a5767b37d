# SPDX-License-Identifier: Apache-2.0
"""Tensors by name, fetched when asked for. Knows no file format and no names' meaning.

The canonical name of a weight is `<slot>.<param>`, e.g. `2.attention.dense.weight`: its name in a NeoX layer file, after
the layer's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megatron.errors import CheckpointError

SEQUENTIAL = "sequential."
TIED = "tied_modules.embed."


class LazyState(Mapping[str, Tensor]):
    """A read-only mapping name -> tensor whose tensors are made on access and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


def canonical_name(name: str) -> str:
    """A name of the module, sequential or pipeline, as `<slot>.<parameter>`."""
    # DeepSpeed files a shared module under its key; the embedding, slot 0, is the only one.
    return re.sub(r"^(sequential\.|tied_modules\.embed\.)", lambda match: "" if match.group(1) == "sequential." else "0.", name)


def canonical_state(module: nn.Module) -> dict[str, Tensor]:
    """The stored tensors of a `Transformer` by canonical name (not copied)."""
    return {name.removeprefix(SEQUENTIAL): tensor for name, tensor in module.state_dict().items()}


def load_canonical(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a canonical state into a `Transformer` of one tensor rank, one tensor at a time, in the module's dtype.

    Raises CheckpointError naming missing, unknown or misshapen tensors.
    """
    own = canonical_state(module)
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        raise CheckpointError(
            f"weights and model do not fit: missing {summary(missing)}; unknown {summary(unknown)}",
            fix="check that the configuration is the one of the checkpoint",
        )
    with torch.no_grad():
        for name, target in own.items():
            source = state[name]
            if source.shape != target.shape:
                raise CheckpointError(
                    f"{name} is {tuple(source.shape)} in the checkpoint and {tuple(target.shape)} in the model",
                    fix="check the sizes in the configuration",
                )
            target.copy_(source)


def summary(names: list[str], most: int = 6) -> str:
    """A list of names for an error message, cut after `most`."""
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
