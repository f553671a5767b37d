# SPDX-License-Identifier: Apache-2.0
"""The opening of the stream: positions that are added, and where they restart."""

import math

import pytest
import torch

from megatron.errors import NeoXError
from megatron.model.embedding import Embedding, sinusoid
from megatron.model.layer_state import LayerCache, LayerState
from megatron.model.spec import EmbeddingSpec, Positions
from megatron.mpu.groups import Group

TOKENS = [[3, 1, 4, 1, 5]]
SEGMENTS = [[0, 0, 1, 1, 1]]


def build(positions: Positions, **changes: object) -> Embedding:
    torch.manual_seed(0)
    return Embedding(EmbeddingSpec(vocab_size=8, hidden_size=6, positions=positions, max_positions=5, **changes), tp=Group.single())


def test_learned_positions_restart_with_each_document():
    layer = build(Positions.LEARNED, position_offset=2, multiplier=3.0, position_multiplier=0.5)
    assert layer.position_embeddings.weight.shape == (7, 6)
    hidden, *_ = layer(LayerState(torch.tensor(TOKENS), torch.tensor(SEGMENTS)))
    words, table = layer.word_embeddings.weight, layer.position_embeddings.weight
    expected = 3.0 * words[torch.tensor(TOKENS)] + 0.5 * table[torch.tensor([[2, 3, 2, 3, 4]])]
    torch.testing.assert_close(hidden, expected)


def test_sinusoid():
    added = sinusoid(torch.tensor([[0, 7]]), 4)[0, 1]
    torch.testing.assert_close(added, torch.tensor([math.sin(7), math.sin(0.07), math.cos(7), math.cos(0.07)]))
    layer = build(Positions.SINUSOIDAL)
    hidden, *_ = layer(LayerState(torch.tensor(TOKENS), torch.zeros(1, 5, dtype=torch.int32)))
    torch.testing.assert_close(hidden - layer.word_embeddings(torch.tensor(TOKENS)), sinusoid(torch.arange(5)[None], 6))


def test_a_cache_moves_positions_on():
    layer = build(Positions.LEARNED)
    tokens, joined = torch.tensor(TOKENS), torch.zeros(1, 5, dtype=torch.int32)
    whole, *_ = layer(LayerState(tokens, joined))
    cache = LayerCache(1, 5, "cpu")
    cache.advance(3)
    tail, *_ = layer(LayerState(tokens[:, 3:], joined[:, 3:]), cache)
    torch.testing.assert_close(tail, whole[:, 3:])


def test_too_long_for_the_table():
    with pytest.raises(NeoXError, match="6 tokens do not fit 5 learned positions"):
        build(Positions.LEARNED)(LayerState(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int32)))


def test_dropout_only_while_training():
    layer = build(Positions.NONE, dropout=0.5)
    stream = LayerState(torch.tensor(TOKENS), torch.tensor(SEGMENTS))
    assert float((layer.train()(stream).hidden == 0).float().mean()) > 0.2
    assert not bool((layer.eval()(stream).hidden == 0).any())


def test_stored_frequencies_are_ignored():
    layer = build(Positions.SINUSOIDAL)
    layer.load_state_dict({**layer.state_dict(), "position_embeddings.inv_freq": torch.ones(3)})
