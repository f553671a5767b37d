# SPDX-License-Identifier: Apache-2.0
"""The one thing that flows from layer to layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerState(NamedTuple):
    """What a layer takes and gives. A tuple by nature, so the pipeline sends it as it is.

    hidden   [b, s, h] activations (the first layer takes token ids [b, s] int64 in its place)
    segment_ids [b, s]    int32 document number within the row; attention never crosses a change.
                       All zero when documents are joined.

    A rank may have a part of the sequence's hidden states (sequence and context parallelism); segment_ids are always of whole rows.
    """

    hidden: Tensor
    segment_ids: Tensor
