# SPDX-License-Identifier: Apache-2.0
"""The names of the files in a step's folder, as GPT-NeoX and DeepSpeed give them.

FORMAT: the weights and the bookkeeping of a model rank are in mp_rank_<NN>_model_states.pt (under ZeRO-3 each data rank has one with
zero_pp_rank_<NN>_ before); a pipeline has a layer_<NN>-model_<NN>-model_states.pt per layer and tensor rank; a spread optimizer has
[bf16_]zero_pp_rank_<NN>_mp_rank_<NN>_optim_states.pt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

MODEL = re.compile(r"^(?:zero_pp_rank_(?P<data>\d+)_)?mp_rank_(?P<model>\d+)_model_states\.pt$")
LAYER = re.compile(r"^layer_(?P<slot>\d+)-model_(?P<tensor>\d+)-model_states\.pt$")
PARTITION = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<data>\d+)_mp_rank_(?P<model>\d+)_optim_states\.pt$")


def model_name(rank: int) -> str:
    """Of a model rank's weights and bookkeeping.

    >>> model_name(3)
    'mp_rank_03_model_states.pt'
    """
    return f"mp_rank_{rank:02d}_model_states.pt"


def layer_name(slot: int, tensor_rank: int) -> str:
    """Of a layer's weights.

    >>> layer_name(2, 1)
    'layer_02-model_01-model_states.pt'
    """
    return f"layer_{slot:02d}-model_{tensor_rank:02d}-model_states.pt"


def matched(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    """The files of a folder whose names fit a pattern, with what it found; none where there is no folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := pattern.match(path.name):
            yield path, match
