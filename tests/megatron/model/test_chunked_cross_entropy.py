# SPDX-License-Identifier: Apache-2.0
"""The chunked head equals plain logits and torch's cross entropy, value and gradients, at any block size and on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import TrainingError
from megatron.model import chunked_cross_entropy
from megatron.model.chunked_cross_entropy import KL, TokenStats, Wanted, blockwise_nll, blockwise_stats
from megatron.mpu import comm
from megatron.mpu.groups import Group, Topology
from megatron.mpu.sharding import Split, split
from support.dist import run_distributed

ONE = Group.single()


def nll_of(*inputs: Any) -> Tensor:
    return blockwise_nll(*inputs)[0]


def blockwise_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, tp: Group, block: int = 0) -> Tensor:
    found = blockwise_stats(hidden, weight, Wanted(logp=True), tp, targets=targets, mask=mask, block=block).logp
    assert found is not None
    return found


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [3, 7, 8], weight [20, 8], labels, weights with zeros and negatives."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 7, 8, generator=draw).to(dtype), torch.randn(20, 8, generator=draw).to(dtype)
    weights = torch.randn(3, 7, generator=draw).masked_fill(torch.rand(3, 7, generator=draw) < 0.4, 0.0)
    return hidden, weight, torch.randint(0, 20, (3, 7), generator=draw), weights


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def plain_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)


def test_value_and_gradients_equal_cross_entropy_at_any_block_size() -> None:
    for block in (0, 1, 4, 21, 50):
        check_block(block)


def check_block(block: int) -> None:
    hidden, weight, labels, weights = inputs()
    theirs, ours, logp = leaves(hidden, weight), leaves(hidden, weight), leaves(hidden, weight)
    expected = -(plain_logps(*theirs, labels) * weights).sum() / 5.0 * 3.0
    found = nll_of(*ours, labels, weights, ONE, block) / 5.0 * 3.0
    per_token = blockwise_token_logps(*logp, labels, weights != 0, ONE, block)
    assert (per_token[weights == 0] == 0).all()
    through_logps = -(per_token * weights).sum() / 5.0 * 3.0
    for loss in (expected, found, through_logps):
        loss.backward()
    for loss, got in ((found, ours), (through_logps, logp)):
        torch.testing.assert_close(loss, expected)
        for x, y in zip(got, theirs, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


def test_rows_without_weight_are_left_out_where_rows_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all rows are computed, since counting would make the host wait; the weights and the mask still decide."""
    monkeypatch.setattr(chunked_cross_entropy, "_active", lambda weights: None)
    check_block(4)
    hidden, weight, labels, weights = inputs()
    ours, theirs = leaves(hidden, weight), leaves(hidden, weight)
    blockwise_token_logps(*ours, labels, weights != 0, ONE, 4).sum().backward()
    plain_logps(*theirs, labels)[weights != 0].sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


def test_bf16_is_as_exact_as_the_plain_path() -> None:
    hidden, weight, labels, weights = inputs(torch.bfloat16)
    exact, ours = leaves(hidden.double(), weight.double()), leaves(hidden, weight)
    expected = -(plain_logps(*exact, labels) * weights).sum()
    found = nll_of(*ours, labels, weights, ONE, 4)
    assert found.dtype == torch.float32
    expected.backward()
    found.backward()
    assert abs(float(found) - float(expected)) < 0.05 * float(weights.abs().sum())
    for x, y in zip(ours, exact, strict=True):
        assert x.grad.dtype == torch.bfloat16
        assert (x.grad - y.grad).norm() < 0.02 * y.grad.norm()


@pytest.mark.parametrize("block", [0, 64], ids=["one block", "many blocks"])
def test_bf16_gradient_of_a_frequent_token_is_not_rounded_away(block: int) -> None:
    """Half of the rows ask for one token: its weight's gradient is a sum over thousands of rows, which 16 bits cannot hold."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 8, generator=draw).bfloat16()
    weight = (torch.randn(40, 8, generator=draw) * 0.3).bfloat16()
    labels = torch.randint(0, 40, (4096,), generator=draw).masked_fill(torch.rand(4096, generator=draw) < 0.5, 3)
    exact, ours, logp = leaves(hidden.double(), weight.double()), leaves(hidden, weight), leaves(hidden, weight)
    F.cross_entropy(F.linear(*exact), labels, reduction="sum").backward()
    nll_of(*ours, labels, torch.ones(4096), ONE, block).backward()
    (-blockwise_token_logps(*logp, labels, None, ONE, block).sum()).backward()
    for found in (ours, logp):
        for x, y in zip(found, exact, strict=True):
            assert (x.grad - y.grad).norm() < 0.005 * y.grad.norm()
        assert (found[1].grad[3] - exact[1].grad[3]).norm() < 0.005 * exact[1].grad[3].norm()


def test_bf16_gradient_of_a_certain_token_is_not_the_difference_of_two_roundings() -> None:
    """p = 0.999: p - 1 is 0.001, smaller than the 0.002 by which p may be rounded in 16 bits."""
    hidden = torch.zeros(1, 8).index_fill(1, torch.tensor(0), 1.0).bfloat16()
    weight = torch.zeros(3, 8).bfloat16()
    weight[1, 0] = 7.5
    exact, ours = leaves(hidden.double(), weight.double()), leaves(hidden, weight)
    F.cross_entropy(F.linear(*exact), torch.tensor([1]), reduction="sum").backward()
    nll_of(*ours, torch.tensor([1]), torch.ones(1), ONE).backward()
    for x, y in zip(ours, exact, strict=True):
        assert (x.grad - y.grad).norm() < 0.01 * y.grad.norm()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, labels, weights = inputs()
    ours, theirs = leaves(hidden * 100, weight * 10), leaves(hidden * 100, weight * 10)
    found = nll_of(*ours, labels, weights, ONE, 4)
    expected = -(plain_logps(*theirs, labels) * weights).sum()
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-4, atol=1e-3)


def test_nothing_trained_means_no_gradient_and_frozen_inputs_get_none() -> None:
    hidden, weight, labels, weights = inputs()
    ours = leaves(hidden, weight)
    nll_of(*ours, labels, torch.zeros_like(weights), ONE).backward()
    assert all(x.grad is not None and (x.grad == 0).all() for x in ours)
    (x,) = leaves(hidden)
    nll_of(x, weight, labels, weights, ONE).backward()
    assert x.grad is not None and weight.grad is None
    # A poisoned row without weight does not spoil the others.
    poisoned = hidden.masked_fill((weights == 0)[..., None], float("nan"))
    assert torch.isfinite(nll_of(poisoned, weight, labels, weights, ONE))


def test_evaluation_forms_no_gradient_and_a_second_backward_is_refused() -> None:
    hidden, weight, labels, weights = inputs()
    ours = leaves(hidden, weight)
    with torch.no_grad():
        quiet = nll_of(*ours, labels, weights, ONE)
    assert not quiet.requires_grad
    loss = nll_of(*ours, labels, weights, ONE)
    torch.testing.assert_close(loss.detach(), quiet)
    loss.backward(retain_graph=True)
    with pytest.raises(TrainingError, match="differentiated twice"):
        loss.backward()


def on_two_ranks(rank: int, world: int) -> dict[str, Tensor]:
    tp = comm.open_groups(Topology(tensor=world), rank).tp
    hidden, weight, labels, weights = inputs()
    out: dict[str, Tensor] = {}
    for name in ("nll", "logps"):
        x, w = leaves(hidden, split(weight, Split(0), rank, world))
        if name == "nll":
            loss = nll_of(x, w, labels, weights, tp, 4)
        else:
            loss = (blockwise_token_logps(x, w, labels, None, tp, 4) * weights).sum()
        loss.backward()
        out |= {name: loss.detach(), f"{name} x": x.grad, f"{name} w": w.grad}
    return out


@pytest.mark.timeout(120)
def test_two_ranks_equal_one() -> None:
    hidden, weight, labels, weights = inputs()
    for rank, found in enumerate(run_distributed(on_two_ranks, 2)):
        for name, sign in (("nll", -1), ("logps", 1)):
            theirs = leaves(hidden, weight)
            loss = sign * (plain_logps(*theirs, labels) * weights).sum()
            loss.backward()
            torch.testing.assert_close(found[name], loss.detach())
            torch.testing.assert_close(found[f"{name} x"], theirs[0].grad, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[f"{name} w"], split(theirs[1].grad, Split(0), rank, 2), rtol=1e-5, atol=1e-6)


TERMS = ("logp", "lse", "entropy", "kl")


def plain_stats(hidden: Tensor, weight: Tensor, labels: Tensor, second: tuple[Tensor, Tensor], direction: KL) -> TokenStats:
    """The same by torch's log_softmax over full logits."""
    logits = F.linear(hidden, weight)
    logp, logq = logits.log_softmax(-1), F.linear(*second).log_softmax(-1)
    terms = logq.exp() * (logq - logp) if direction is KL.FORWARD else logp.exp() * (logp - logq)
    picked = logp.gather(-1, labels[..., None])[..., 0]
    return TokenStats(picked, logits.logsumexp(-1), -(logp.exp() * logp).sum(-1), terms.sum(-1), logits.argmax(-1))


def second_head() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(3, 7, 5, generator=draw), torch.randn(20, 5, generator=draw)


def weighted(stats: TokenStats, mask: Tensor, only: tuple[str, ...] = TERMS) -> Tensor:
    """One number in which every position of every statistic counts differently."""
    draw = torch.Generator().manual_seed(9)
    factors = {name: torch.randn(3, 7, generator=draw) * mask for name in TERMS}
    return sum((getattr(stats, name) * factors[name]).sum() for name in only)


@pytest.mark.parametrize("direction", KL)
@pytest.mark.parametrize("counted", [True, False], ids=["rows are counted", "all rows"])
def test_statistics_and_their_gradients_equal_log_softmax(direction: KL, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not counted:
        monkeypatch.setattr(chunked_cross_entropy, "_active", lambda weights: None)
    hidden, weight, labels, weights = inputs()
    mask, second = weights != 0, second_head()
    for block, only in ((4, TERMS), (0, TERMS), *((4, (name,)) for name in TERMS)):
        wanted = Wanted(**{name: name in only for name in TERMS[:3]}, top1=True, kl=direction if "kl" in only else None, second=second)
        ours, theirs = leaves(hidden, weight), leaves(hidden, weight)
        found = blockwise_stats(*ours, wanted, ONE, targets=labels, mask=mask, block=block)
        expected = plain_stats(*theirs, labels, second, direction)
        assert torch.equal(found.top1, expected.top1 * mask)
        for name in TERMS:
            if name in only:
                torch.testing.assert_close(getattr(found, name), getattr(expected, name) * mask, rtol=1e-5, atol=1e-5)
            else:
                assert getattr(found, name) is None
        weighted(found, mask, only).backward()
        weighted(expected, mask, only).backward()
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_the_loss_s_pass_gives_token_logps_too() -> None:
    hidden, weight, labels, weights = inputs()
    _, logps = blockwise_nll(hidden, weight, labels, weights, ONE, 4)
    torch.testing.assert_close(logps, plain_logps(hidden, weight, labels) * (weights != 0))
    assert not logps.requires_grad


def statistics_on_two_ranks(rank: int, world: int) -> list[dict[str, Tensor]]:
    tp = comm.open_groups(Topology(tensor=world), rank).tp
    hidden, weight, labels, weights = inputs()
    other, table = second_head()
    out = []
    for direction in KL:
        x, w = leaves(hidden, split(weight, Split(0), rank, world))
        second = (other, split(table, Split(0), rank, world))
        wanted = Wanted(logp=True, lse=True, entropy=True, top1=True, kl=direction, second=second)
        found = blockwise_stats(x, w, wanted, tp, targets=labels, mask=weights != 0, block=4)
        weighted(found, weights != 0).backward()
        out.append({name: getattr(found, name).detach() for name in (*TERMS, "top1")} | {"x": x.grad, "w": w.grad})
    return out


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_statistics_on_two_ranks_equal_one() -> None:
    hidden, weight, labels, weights = inputs()
    mask = weights != 0
    for rank, directions in enumerate(run_distributed(statistics_on_two_ranks, 2)):
        for direction, found in zip(KL, directions, strict=True):
            theirs = leaves(hidden, weight)
            expected = plain_stats(*theirs, labels, second_head(), direction)
            weighted(expected, mask).backward()
            for name in TERMS:
                torch.testing.assert_close(found[name], (getattr(expected, name) * mask).detach(), rtol=1e-5, atol=1e-5)
            assert torch.equal(found["top1"], expected.top1 * mask)
            torch.testing.assert_close(found["x"], theirs[0].grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["w"], split(theirs[1].grad, Split(0), rank, 2), rtol=1e-4, atol=1e-5)
