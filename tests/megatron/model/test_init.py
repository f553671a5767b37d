# SPDX-License-Identifier: Apache-2.0
"""Initial weights: the laws, and that they depend on nothing but seed and name."""

import math

import pytest
import torch

from megatron.errors import ConfigError
from megatron.model.init import Initialiser, fill, seed_of
from megatron.model.spec import InitSpec, MLPSpec, Positions, Residual
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
from megatron.mpu.sharding import join, sharding_of
from support.specs import HIDDEN, model_spec

H, L, STD = 256, 8, 0.02
LAWS = {
    "normal": STD,
    "scaled_normal": STD / math.sqrt(2 * L),
    "single_residual_scaled_normal": STD / math.sqrt(L),
    "small_init": math.sqrt(2 / (5 * H)),
    "wang_init": 2 / (L * math.sqrt(H)),
    "xavier_uniform": math.sqrt(2 / (512 + 256)),
    "xavier_normal": math.sqrt(2 / (512 + 256)),
}


def drawn(method: str) -> torch.Tensor:
    weight = torch.empty(512, 256)
    law = Initialiser(spec=InitSpec(std=STD), hidden_size=H, num_layers=L, seed=1)
    fill(weight, method, law, torch.Generator().manual_seed(0))
    return weight


def test_spread():
    for method, spread in LAWS.items():
        weight = drawn(method)
        assert float(weight.std()) == pytest.approx(spread, rel=0.02), method
        assert abs(float(weight.mean())) < spread / 50, method


@pytest.mark.parametrize(("method", "gain"), [("orthogonal", 1.0), ("scaled_orthogonal", math.sqrt(2 / L))])
def test_orthogonal(method: str, gain: float):
    weight = drawn(method)
    torch.testing.assert_close(weight.T @ weight, gain**2 * torch.eye(256), atol=1e-4, rtol=0)


def test_unknown_method():
    with pytest.raises(ConfigError, match="unknown initialiser 'zeros'"):
        drawn("zeros")


def test_seeds_are_stable():
    # A change here changes every run's initial weights.
    assert seed_of(1234, "2.attention.dense.weight") == 8343050423505158815
    assert seed_of(1234, "2.attention.dense.weight") != seed_of(1235, "2.attention.dense.weight")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tensor_ranks_hold_slices_of_one_model(kv_heads: int):
    spec = model_spec(
        residual=Residual.PARALLEL, mlp=MLPSpec(hidden_size=HIDDEN, width=48, activation="swiglu"), attention={"num_kv_heads": kv_heads}
    )
    whole = Transformer(spec, seed=3)
    how = sharding_of(whole)
    ranks = [Transformer(spec, groups=Groups(tp=Group(rank=rank, size=2)), seed=3).state_dict() for rank in range(2)]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(join([rank[name] for rank in ranks], how[name]), tensor, rtol=0, atol=0)


def test_roles():
    """Projections into the residual stream by the output method, other matrices by the input method, vectors as their modules set them."""
    spec = model_spec(positions=Positions.RPE, init=InitSpec(method="normal", output_method="normal", std=0.5))
    state = Transformer(spec).state_dict()
    assert all(bool((tensor == 0).all()) for name, tensor in state.items() if name.endswith("bias"))
    assert all(bool((tensor == 1).all()) for name, tensor in state.items() if name.endswith("layernorm.weight"))
    other = Transformer(
        model_spec(positions=Positions.RPE, init=InitSpec(method="normal", output_method="orthogonal", std=0.5))
    ).state_dict()
    changed = {name.split(".", 2)[2] for name in state if not torch.equal(state[name], other[name])}
    assert changed == {"attention.dense.weight", "mlp.linear2.weight"}


def test_meta_makes_no_weights():
    model = Transformer(model_spec(), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert Transformer(model_spec(), dtype=torch.bfloat16).sequential["2"].mlp.linear1.weight.dtype == torch.bfloat16
