# SPDX-License-Identifier: Apache-2.0
"""Layers and losses on two tensor parallel ranks equal those on one, forward and in every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.mpu import comm
from megatron.mpu.groups import Group, Topology
from megatron.mpu.layers import ColumnLinear, RowLinear, SplitLinear, VocabEmbedding, attach_linear
from megatron.mpu.random import drop_by_head, head_seeds, seeded
from megatron.mpu.sharding import sharding_of, split
from support.dist import run_distributed


class Net(nn.Module):
    """Every layer once: embed, up in two parts, down with and without a deferred reduce, logits."""

    def __init__(self, tp: Group) -> None:
        super().__init__()
        self.tp = tp
        self.embed = VocabEmbedding(12, 8, tp=tp)
        self.up = ColumnLinear(8, 16, tp=tp, parts=(8, 8))
        self.down = RowLinear(8, 8, tp=tp)
        self.share = RowLinear(8, 8, tp=tp, defer_reduce=True)
        self.head = ColumnLinear(8, 12, tp=tp, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(tokens)
        value, gate = self.up(hidden).chunk(2, dim=-1)
        inner = value * torch.tanh(gate)
        hidden = hidden + self.down(inner) + comm.reduce(self.share(inner), self.tp)
        logits = self.head(hidden)
        return hidden, logits


def results(tp: Group, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of one fixed loss; weights are whole."""
    net = Net(tp)
    table = sharding_of(net)
    net.load_state_dict({name: split(whole, table[name], tp.rank, tp.size) for name, whole in weights.items()})
    tokens = torch.tensor([[0, 5, 6, 11, 3], [7, 7, 1, 2, 10]])
    targets = torch.tensor([[5, 6, 11, 3, 0], [7, 1, 2, 10, 4]])
    hidden, logits = net(tokens)
    logps = comm.gather(logits, tp).log_softmax(-1)
    losses, others = (-logps.gather(-1, ids[..., None])[..., 0] for ids in (targets, targets.flip(0)))
    (losses.mean() + 0.1 * others.square().sum()).backward()
    out = {"hidden": hidden.detach(), "nll": losses.detach(), "logits": comm.gather(logits, tp).detach()}
    return out | {f"grad {name}": parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def on_two_ranks(rank: int, world: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tp = comm.open_groups(Topology(tensor=world), rank).tp
    out = results(tp, weights)
    x = torch.arange(4.0).view(1, 4).requires_grad_()
    whole = comm.gather(comm.scatter(x, tp), tp)
    spread = comm.gather_sequence(comm.reduce_scatter(x * (rank + 1), tp, dim=1), tp, dim=1)
    (whole.sum() + (spread * (rank + 1)).sum()).backward()
    out |= {"round trip": whole.detach(), "summed": spread.detach(), "grad x": x.grad}
    torch.manual_seed(3)
    seeds = head_seeds(2, tp)
    out["heads"] = drop_by_head(torch.ones(2, 2, 50), 0.5, seeds)
    with seeded(seeds[0], x.device):
        out["own"] = torch.rand(4)
    out["common"] = torch.rand(4)
    return out


@pytest.mark.timeout(120)
def test_two_ranks_equal_one() -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) * 0.5 for name, value in Net(Group.single()).state_dict().items()}
    table = sharding_of(Net(Group.single()))
    # Under a deferred reduce each rank holds half the bias and sees the gradient of the sum.
    whole = results(Group.single(), weights)
    ranks = run_distributed(on_two_ranks, 2, weights=weights)
    for rank, found in enumerate(ranks):
        for name, expected in whole.items():
            if name.startswith("grad ") and name != "grad share.bias":
                expected = split(expected, table[name[5:]], rank, 2)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert found["round trip"].tolist() == [[0, 1, 2, 3]]
        assert found["summed"].tolist() == [[0, 3, 6, 9]]
        assert found["grad x"].tolist() == [[1 + 3 * (rank + 1)] * 4]
    torch.manual_seed(3)
    heads = drop_by_head(torch.ones(2, 4, 50), 0.5, head_seeds(4, Group.single()))
    assert torch.equal(torch.cat([ranks[0]["heads"], ranks[1]["heads"]], dim=1), heads), "dropout depends on the tensor size"
    assert not torch.equal(heads[:, 0], heads[:, 1]) and 60 < float(heads[:, 0].count_nonzero()) * 1.2 < 180
    assert torch.equal(ranks[0]["common"], torch.rand(4)) and torch.equal(ranks[0]["common"], ranks[1]["common"])
    assert not torch.equal(ranks[0]["own"], ranks[1]["own"])


def test_sizes_that_do_not_divide_are_refused() -> None:
    tp = Group(rank=0, size=2)
    with pytest.raises(ConfigError, match="padded vocabulary 7"):
        VocabEmbedding(7, 4, tp=tp)
    with pytest.raises(ConfigError):
        ColumnLinear(4, 8, tp=tp, parts=(5, 3))


class LowRank(nn.Module):
    """The product with the weight plus that with two small matrices, as LoRA has it."""

    def __init__(self, layer: SplitLinear) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        self.a, self.b = nn.Parameter(torch.randn(2, columns)), nn.Parameter(torch.randn(rows, 2))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias) + x @ self.a.T @ self.b.T


def test_one_operation_serves_column_and_row_layers() -> None:
    """Attached from outside, it is used in every product and its parameters are the layer's; the others are left alone."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"up": ColumnLinear(4, 6, tp=Group.single()), "down": RowLinear(6, 4, tp=Group.single()), "same": nn.Linear(4, 4)})
    x = torch.randn(3, 4)
    before = net["up"](x)
    assert attach_linear(net, lambda name, layer: LowRank(layer) if name == "up" else None) == ["up"]
    extra = net["up"].linear
    torch.testing.assert_close(net["up"](x), before + x @ extra.a.T @ extra.b.T)
    assert {"up.linear.a", "up.linear.b"} <= set(net.state_dict()) and "down.linear.a" not in net.state_dict()
    assert attach_linear(net, lambda name, layer: LowRank(layer)) == ["up", "down"]
    inner = torch.randn(3, 6)
    expected = F.linear(inner, net["down"].weight, net["down"].bias) + inner @ net["down"].linear.a.T @ net["down"].linear.b.T
    torch.testing.assert_close(net["down"](inner), expected)
