# SPDX-License-Identifier: Apache-2.0
"""Initial weights: the laws, and that they depend on nothing but seed and name."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.model.init import BLOCK_ROWS, Initialiser, seed_of
from megatron.model.spec import InitSpec, MLPSpec, Positions, Residual
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
from megatron.mpu.layers import ColumnLinear, RowLinear, VocabEmbedding
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


ORTHOGONAL = ("orthogonal", "scaled_orthogonal")


def start(method: str = "normal", **spec: float) -> Initialiser:
    return Initialiser(spec=InitSpec(method=method, output_method=method, std=STD, **spec), hidden_size=H, num_layers=L, seed=1)


def drawn(method: str, module: nn.Module | None = None, tp: Group | None = None, **spec: float) -> torch.Tensor:
    """The weight of a module after its initialisation."""
    module = module or nn.Linear(256, 512, bias=False)
    start(method, **spec)(module, "7", Groups(tp=tp or Group.single()))
    (weight,) = (p for p in module.parameters() if p.dim() > 1)
    return weight.detach()


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


def over(size: int, make: Callable[[Group], nn.Module], method: str) -> torch.Tensor:
    """The whole weight, joined from `size` tensor ranks."""
    ranks = [Group(rank=rank, size=size) for rank in range(size)]
    modules = [make(group) for group in ranks]
    shards = [drawn(method, module, group) for module, group in zip(modules, ranks, strict=True)]
    return join(shards, sharding_of(modules[0])["weight"])


@pytest.mark.parametrize("method", [*LAWS, *ORTHOGONAL])
def test_weights_are_the_same_at_every_tensor_parallel_size(method: str):
    """More than one block of rows, cuts inside blocks, fused parts, and cuts of columns."""
    makers: list[Callable[[Group], nn.Module]] = [
        lambda tp: ColumnLinear(12, 600, tp=tp, bias=False),
        lambda tp: ColumnLinear(12, 600, tp=tp, bias=False, parts=(400, 120, 80)),
        lambda tp: RowLinear(16, 300, tp=tp, bias=False),
    ]
    for make in makers:
        alone = over(1, make, method)
        for size in (2, 4):
            assert torch.equal(over(size, make, method), alone)


@pytest.mark.parametrize("method", LAWS)
def test_padding_changes_no_row(method: str):
    """At another tensor parallel size the vocabulary is padded to another number of rows."""
    words = 301

    def table(size: int) -> torch.Tensor:
        rows = -(-words // (128 * size)) * 128 * size
        whole = over(size, lambda tp: VocabEmbedding(rows, 8, tp=tp), method)
        if method.startswith("xavier"):  # its spread reads the padded shape
            whole = whole / math.sqrt(2 / (rows + 8))
        return whole[:words]

    for size in (2, 4):
        torch.testing.assert_close(table(size), table(1), rtol=1e-6 if method.startswith("xavier") else 0, atol=0)
    other = torch.cat([table(1)[BLOCK_ROWS:], table(1)[:45]])
    assert not torch.equal(other[:45], other[45:]), "two blocks are equal"


def test_a_rank_draws_only_blocks_it_holds(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    draw = torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *args, **kw: (seen.append(len(self)), draw(self, *args, **kw))[1])
    embedding = VocabEmbedding(4096, 2, tp=Group(rank=3, size=8))
    seen.clear()
    drawn("normal", embedding)
    assert seen == [BLOCK_ROWS] * 2


def test_partitioned_weights_are_gathered():
    """As under ZeRO-3: outside of the gathering context a parameter is an empty vector that knows its whole shape."""
    module, kept = nn.Linear(12, 600, bias=False), {}
    module.weight.ds_shape, module.weight.data = module.weight.shape, torch.empty(0)  # type: ignore[assignment]

    @contextmanager
    def gather(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        (parameter,) = parameters
        parameter.data = torch.empty(parameter.ds_shape)  # type: ignore[attr-defined]
        yield
        kept["whole"], parameter.data = parameter.data, torch.empty(0)

    replace(start("normal"), gather=gather)(module, "7", Groups.single())
    assert torch.equal(kept["whole"], drawn("normal", nn.Linear(12, 600, bias=False)))


def test_mup_spread():
    """The width is four times the base's: hidden matrices by the law of this width, tables by that of the base's."""
    table = VocabEmbedding(512, 256, tp=Group.single())
    assert float(drawn("normal", width_mult=4.0).std()) == pytest.approx(STD / 2, rel=0.02)
    assert float(drawn("normal", table, width_mult=4.0, scale=3.0).std()) == pytest.approx(3 * STD, rel=0.02)
    for method in ("small_init", "wang_init", "xavier_normal", "xavier_uniform"):
        assert float(drawn(method, width_mult=4.0).std()) == pytest.approx(LAWS[method], rel=0.02), method
    assert float(drawn("small_init", table, width_mult=4.0).std()) == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.02)
    assert float(drawn("xavier_normal", table, width_mult=4.0).std()) == pytest.approx(math.sqrt(2 / (512 + 64)), rel=0.02)
    assert torch.equal(drawn("small_init", width_mult=1.0), drawn("small_init"))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tensor_ranks_hold_slices_of_one_model(kv_heads: int):
    spec = model_spec(
        residual=Residual.PARALLEL, ffn=MLPSpec(hidden_size=HIDDEN, width=48, activation="swiglu"), attention={"num_kv_heads": kv_heads}
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
