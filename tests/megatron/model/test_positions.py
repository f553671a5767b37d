# SPDX-License-Identifier: Apache-2.0
"""Rotary tables equal transformers', rotation is relative, buckets and slopes equal their papers' worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.model.positions import Alibi, RelativeBias, Rotary, alibi_slopes, rotary_frequencies, rotate
from megatron.model.spec import RopeScaling, RotarySpec, RpeSpec
from megatron.mpu.groups import Group


def test_frequencies_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def theirs(kind: str, length: int | None = None, **scaling: float) -> tuple[torch.Tensor, float]:
        # transformers 4 reads the base beside rope_scaling, transformers 5 in it.
        config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_theta=5e5, max_position_embeddings=512)
        config.rope_scaling = {"rope_type": kind, "rope_theta": 5e5, **scaling}
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)

    def ours(kind: str, **scaling: float) -> tuple[torch.Tensor, float]:
        return rotary_frequencies(RotarySpec(dim=64, base=5e5, scaling=RopeScaling(kind=kind, **scaling)))

    original = {"original_max_position_embeddings": 512}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original}
    pairs = [
        (ours("linear", factor=4.0), theirs("linear", factor=4.0)),
        (ours("llama3", **llama3), theirs("llama3", **llama3)),
        (ours("yarn", factor=8.0, **original), theirs("yarn", factor=8.0, **original)),
        (
            ours("yarn", factor=2.0, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, **original),
            theirs("yarn", factor=2.0, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, **original),
        ),
        # Their dynamic form at twice the trained length has the strength factor * 2 - (factor - 1) = factor + 1.
        (ours("ntk", factor=4.0), theirs("dynamic", length=1024, factor=3.0)),
    ]
    for (frequencies, factor), (expected, expected_factor) in pairs:
        torch.testing.assert_close(frequencies, expected, rtol=2e-6, atol=0)
        assert factor == pytest.approx(expected_factor)


def test_rotation_equals_transformers_and_leaves_the_rest() -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, 16), torch.randn(2, 7, 3, 16)
    cos, sin = Rotary(RotarySpec(dim=4))(torch.arange(7)[None])
    expanded = [torch.cat((table, table), -1)[:, :, 0] for table in (cos, sin)]
    expected = apply_rotary_pos_emb(q.transpose(1, 2)[..., :4], k.transpose(1, 2)[..., :4], *expanded)
    for x, turned in zip((q, k), expected, strict=True):
        out = rotate(x, cos, sin)
        torch.testing.assert_close(out[..., :4], turned.transpose(1, 2), rtol=1e-6, atol=1e-6)
        assert torch.equal(out[..., 4:], x[..., 4:])


def test_scores_depend_on_the_distance_only_and_have_no_longest_length() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    rotary = Rotary(RotarySpec(dim=32))

    def score(at: int, behind: int) -> float:
        turned = [rotate(x, *rotary(torch.tensor([[place]]))) for x, place in ((q, at), (k, at - behind))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 3) == pytest.approx(score(2000, 3), abs=1e-3)
    cos, _ = rotary(torch.tensor([[0, 70_000]]))
    assert cos.dtype == torch.float32 and cos[0, 0, 0, 0] == 1.0


def test_frequencies_stay_exact_when_the_model_is_cast_and_are_stored_on_demand() -> None:
    kept, free = Rotary(RotarySpec(dim=8, save_freqs=True)), Rotary(RotarySpec(dim=8))
    assert kept.bfloat16()(torch.arange(3)[None])[0].dtype == torch.float32
    assert list(kept.state_dict()) == ["inv_freq"] and list(free.state_dict()) == []
    # An old checkpoint may hold them or not.
    assert free.load_state_dict(kept.state_dict()) == kept.load_state_dict({})
    with pytest.raises(ConfigError, match="original"):
        Rotary(RotarySpec(dim=8, scaling=RopeScaling(kind="yarn", factor=2.0)))
    with pytest.raises(ConfigError, match="'magic' is not known"):
        Rotary(RotarySpec(dim=8, scaling=RopeScaling(kind="magic")))
    with pytest.raises(ConfigError, match="pairs"):
        Rotary(RotarySpec(dim=5))


def test_relative_buckets_equal_transformers_t5() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    bias = RelativeBias(RpeSpec(num_buckets=32, max_distance=128), heads=3, head_dim=16, tp=Group.single())
    nn.init.normal_(bias.weight)
    ahead = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    bucket = T5Attention._relative_position_bucket(ahead, bidirectional=False, num_buckets=32, max_distance=128)
    expected = bias.weight[bucket].permute(2, 0, 1) * math.sqrt(16)
    torch.testing.assert_close(bias(300, 300), expected)
    torch.testing.assert_close(bias(2, 300), expected[:, -2:])


def test_alibi_slopes_and_distances() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    # 6 heads: four of 2^(-8/4 i), then the first and third of eight of 2^(-i).
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    alibi = Alibi(8, tp=Group(rank=1, size=2))
    bias = alibi(2, 3, torch.device("cpu"))
    assert bias.shape == (4, 2, 3)
    assert bias[0, 1].tolist() == [-2 * 2.0**-5, -(2.0**-5), 0.0]
    assert alibi.state_dict()["slopes"].tolist() == alibi_slopes(8)[4:]
    alibi.load_state_dict({})
