# SPDX-License-Identifier: Apache-2.0
"""Tokens per character."""

from __future__ import annotations

import math

import pytest

from megatron.hooks.validation import Characters, with_perplexity
from megatron.mpu.groups import Group

WORDS = {1: "a", 2: "bcd", 3: "\u00e9", 9: "<end>"}


def test_only_trained_text_counts() -> None:
    """Five trained tokens, one of them the end of a document, stand for 1 + 3 + 1 + 3 characters."""
    import torch

    from megatron.data.batch import Batch

    labels = torch.tensor([[1, 2, 9, 3], [2, 2, 1, 1]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    batch = Batch(tokens=labels, labels=labels, loss_weight=weight, segment_ids=torch.zeros_like(labels))
    counted = Characters(lambda ids: "".join(WORDS[i] for i in ids), eod=9)
    assert list(counted.counted([batch])) == [batch]
    ratio = counted.per_character(Group.single(), torch.device("cpu"))
    assert ratio == 5 / 8
    metrics = with_perplexity({"lm_loss": 1.6, "reward": 1.0, "tokens_per_char": ratio})
    assert list(metrics) == ["lm_loss", "reward", "lm_loss_ppl", "lm_loss_char_lvl_ppl"]
    assert metrics["lm_loss_char_lvl_ppl"] == pytest.approx(math.e)
    assert Characters(lambda ids: "", eod=9).per_character(Group.single(), torch.device("cpu")) == 0.0
