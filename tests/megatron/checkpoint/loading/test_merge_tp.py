# SPDX-License-Identifier: Apache-2.0
"""From tensor ranks to another number of them: weights, what an optimizer keeps of them, and rows that only fill the vocabulary up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.errors import CheckpointError


def test_shares_of_a_bias_halve_and_their_momentum_does_not() -> None:
    """A share of a summed bias has the gradient of the whole; sums of gradients times the rate are shares again."""
    import torch

    from megatron.checkpoint.formats.torch_file import canonical_state
    from megatron.checkpoint.loading.merge_tp import Spreading
    from megatron.model.spec import Residual
    from megatron.model.transformer import Transformer
    from megatron.mpu.groups import Group
    from support.specs import model_spec

    spec = model_spec(residual=Residual.PARALLEL)
    whole = {name: torch.randn(tensor.shape) for name, tensor in canonical_state(Transformer(spec)).items()}
    halves = [Spreading(spec, 1, Group(rank=rank, size=2, ranks=(0, 1))) for rank in (0, 1)]
    bias, matrix = "2.mlp.linear2.bias", "2.mlp.linear2.weight"
    for rank, one in enumerate(halves):
        assert torch.equal(one.weights([whole])[bias], whole[bias] / 2)
        assert torch.equal(one.states([whole], "exp_avg")[bias], whole[bias])
        assert torch.equal(one.states([whole], "grad_sum")[bias], whole[bias] / 2)
        assert torch.equal(one.states([whole], "exp_avg")[matrix], whole[matrix].chunk(2, 1)[rank])
    for back in ("weights", "exp_avg"):
        shards = [dict(one.weights([whole]) if back == "weights" else one.states([whole], back)) for one in halves]
        again = Spreading(spec, 2, Group.single())
        found = again.weights(shards) if back == "weights" else again.states(shards, back)
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_filling_rows_are_cut_off_and_added() -> None:
    """All other numbers stay."""
    import torch

    from megatron.checkpoint.formats.torch_file import canonical_state
    from megatron.checkpoint.loading.merge_tp import Spreading, with_vocabulary
    from megatron.model.transformer import Transformer
    from megatron.mpu.groups import Group
    from support.specs import model_spec

    small = model_spec()
    large = with_vocabulary(small, small.vocab_size + 16)
    weights = {name: torch.randn(tensor.shape) for name, tensor in canonical_state(Transformer(small)).items()}
    more = Spreading(large, 1, Group.single(), rows=small.vocab_size).weights([weights])
    table = more["0.word_embeddings.weight"]
    assert table.shape[0] == large.vocab_size and (table[small.vocab_size :] == 0).all()
    less = Spreading(small, 1, Group.single(), rows=large.vocab_size).weights([dict(more)])
    assert all(torch.equal(less[name], weights[name]) for name in weights)
    assert replace(large, embedding=small.embedding, head=small.head) == small


def test_another_vocabulary_is_another_model() -> None:
    """Between 385 and 512 tokens, and between 513 and 640: no vocabulary is both."""
    from megatron.checkpoint.loading.resume_state import compare_args

    args = {"make_vocab_size_divisible_by": 128, "model_parallel_size": 1, "padded_vocab_size": 512}
    compare_args({**args, "model_parallel_size": 2}, args, Path("somewhere"))
    compare_args({**args, "model_parallel_size": 3, "padded_vocab_size": 768}, args, Path("somewhere"))
    with pytest.raises(CheckpointError, match="padded_vocab_size: checkpoint 512, now 640"):
        compare_args({**args, "padded_vocab_size": 640}, args, Path("somewhere"))
