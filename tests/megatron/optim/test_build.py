# SPDX-License-Identifier: Apache-2.0
"""Every optimizer against the formula of its paper in float64 numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.optim.build import build_optimizer, build_schedule, build_scheduler, make_optimizer
from megatron.optim.schedules import Decay, OnResume, ScheduleSpec
from support.tiny import tiny

CPU = torch.device("cpu")
Step = Callable[[np.ndarray, np.ndarray, float, int], np.ndarray]


def adam(lr: float, b1: float, b2: float, eps: float, decoupled: bool) -> Step:
    m: dict[float, Any] = {}

    def step(w: np.ndarray, g: np.ndarray, decay: float, t: int) -> np.ndarray:
        if decoupled:
            w = w - lr * decay * w
        else:
            g = g + decay * w
        first, second = m.get(decay, (0.0, 0.0))
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        m[decay] = (first, second)
        return w - lr * (first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + eps)

    return step


def sgd(lr: float, momentum: float) -> Step:
    buffers: dict[float, Any] = {}

    def step(w: np.ndarray, g: np.ndarray, decay: float, t: int) -> np.ndarray:
        g = g + decay * w
        buffers[decay] = momentum * buffers[decay] + g if decay in buffers else g
        return w - lr * buffers[decay]

    return step


def lion(lr: float, b1: float, b2: float) -> Step:
    m: dict[float, Any] = {}

    def step(w: np.ndarray, g: np.ndarray, decay: float, t: int) -> np.ndarray:
        old = m.get(decay, 0.0)
        m[decay] = b2 * old + (1 - b2) * g
        return w - lr * (np.sign(b1 * old + (1 - b1) * g) + decay * w)

    return step


CASES: list[tuple[str, dict[str, Any], Callable[[], Step]]] = [
    ("adam", {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8}, lambda: adam(0.01, 0.9, 0.95, 1e-8, True)),
    ("adam", {"lr": 0.01, "adam_w_mode": False}, lambda: adam(0.01, 0.9, 0.999, 1e-8, False)),
    ("adamw", {"lr": 0.01, "eps": 1e-6}, lambda: adam(0.01, 0.9, 0.999, 1e-6, True)),
    ("cpu_torch_adam", {"lr": 0.01}, lambda: adam(0.01, 0.9, 0.999, 1e-8, True)),
    ("sgd", {"lr": 0.01, "momentum": 0.9}, lambda: sgd(0.01, 0.9)),
    ("lion", {"lr": 0.01, "betas": [0.9, 0.99]}, lambda: lion(0.01, 0.9, 0.99)),
]


def test_ten_steps_equal_the_formula() -> None:
    # One test for all: a process's first optimizer costs seconds of imports inside torch.
    for name, params, reference in CASES:
        check_ten_steps(name, params, reference)


def check_ten_steps(name: str, params: dict[str, Any], reference: Callable[[], Step]) -> None:
    rng = np.random.default_rng(0)
    start = {0.1: rng.normal(size=(7, 5)), 0.0: rng.normal(size=(3,))}
    weights = {decay: nn.Parameter(torch.tensor(w, dtype=torch.float32)) for decay, w in start.items()}
    optimizer = make_optimizer(name, params, [{"params": [w], "weight_decay": d} for d, w in weights.items()], CPU)
    step = reference()
    for t in range(1, 11):
        for decay, weight in weights.items():
            grad = rng.normal(size=start[decay].shape)
            weight.grad = torch.tensor(grad, dtype=torch.float32)
            start[decay] = step(start[decay], grad, decay, t)
        optimizer.step()
    for decay, weight in weights.items():
        np.testing.assert_allclose(weight.detach().numpy(), start[decay], rtol=2e-5, atol=1e-6, err_msg=f"{name} {params}")


def test_fused_adam_goes_on_from_the_state_of_plain_adamw() -> None:
    def make(fused: bool) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
        return model, make_optimizer("adam", {"lr": 0.1}, groups, CPU) if fused else torch.optim.AdamW(groups, lr=0.1)

    def train(model: nn.Linear, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()

    plain, steady = make(False)
    train(plain, steady, range(3))
    fused, resumed = make(True)
    fused.load_state_dict(plain.state_dict())
    resumed.load_state_dict(copy.deepcopy(steady.state_dict()))
    train(plain, steady, range(3, 8))
    train(fused, resumed, range(3, 8))
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-5, atol=1e-6)


def test_refusals_name_the_alternative() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.0}]
    with pytest.raises(ConfigError, match="DeepSpeed no longer has OneBitAdam.*\n(.*\n)?.*adam, adamw"):
        make_optimizer("onebitadam", {"lr": 0.1}, groups, CPU)
    with pytest.raises(ConfigError, match="ns_method 'cubic'"):
        make_optimizer("muon", {"lr": 0.1, "ns_method": "cubic"}, groups, CPU)
    with pytest.raises(ConfigError, match="no parameter beta1"):
        make_optimizer("adam", {"lr": 0.1, "beta1": 0.9}, groups, CPU)
    with pytest.raises(ConfigError, match="two numbers"):
        make_optimizer("adam", {"lr": 0.1, "betas": [0.9, 1.5]}, groups, CPU)
    with pytest.raises(ConfigError, match="adam_w_mode"):
        make_optimizer("adamw", {"lr": 0.1, "adam_w_mode": False}, groups, CPU)


def arguments(**change: Any) -> Any:
    section = {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "momentum": 0.0, "freeze_step": 400}},
        "optimizer_type": "adam",
        "lr": 1e-3,
        "weight_decay": 0.1,
        "use_bnb_optimizer": False,
        "lr_decay_style": "cosine",
        "lr_decay_iters": 8,
        "warmup": 0.25,
        "min_lr": 1e-4,
        "wsd_decay_fraction": 0.1,
        "warmup_from_zero": False,
        "override_lr_scheduler": False,
        "use_checkpoint_lr_scheduler": False,
        "summed_bias_full_lr": False,
    }
    optim = SimpleNamespace(**{**section, **change})
    return SimpleNamespace(optim=optim, model=SimpleNamespace(use_mup=False), runtime=SimpleNamespace(model_parallel_size=1))


def test_every_configured_name_gives_its_optimizer_with_its_numbers() -> None:
    def groups(**extra: Any) -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.5, **extra}]

    sm3 = make_optimizer("sm3", {"lr": 0.1, "momentum": 0.9, "beta": 0.5, "eps": 1e-20}, groups(), CPU)
    assert {key: sm3.param_groups[0][key] for key in ("momentum", "beta", "eps", "weight_decay")} == {
        "momentum": 0.9, "beta": 0.5, "eps": 1e-20, "weight_decay": 0.5,
    }  # fmt: skip
    madgrad = make_optimizer("madgrad_wd", {"lr": 0.1, "momentum": 0.8}, groups(), CPU)
    assert (type(madgrad).__name__, madgrad.param_groups[0]["momentum"]) == ("MADGRADW", 0.8)
    muon = make_optimizer("muon", {"lr": 0.1, "ns_steps": 7, "ns_method": "gram"}, groups(use_muon=True), CPU)
    assert (type(muon).__name__, muon.param_groups[0]["ns_steps"]) == ("Muon", 7)


def test_muon_is_deepspeeds_where_parameters_come_in_pieces() -> None:
    from megatron.model.build import build_transformer
    from megatron.neox_arguments import NeoXArgs

    def built(**keys: Any) -> torch.optim.Optimizer:
        optimizer = {"type": "Muon", "params": {"lr": 0.001, "muon_lr": 0.02, "betas": [0.9, 0.95]}}
        args = NeoXArgs.from_dict(tiny("llama", padded_vocab_size=64, optimizer=optimizer, gradient_clipping=0.0, min_lr=0.0, **keys))
        return build_optimizer(args, build_transformer(args), CPU)

    for keys in ({"zero_optimization": {"stage": 1}}, {"precision": "bfloat16"}):
        assert type(built(**keys)).__name__ == "MuonWithAuxAdam"
    whole = built()
    assert type(whole).__name__ == "Muon"
    assert [(group["use_muon"], group["lr_mult"]) for group in whole.param_groups] == [(False, 1.0), (False, 1.0), (True, 20.0)]


def test_build_reads_the_section() -> None:
    args = arguments()
    optimizer = build_optimizer(args, nn.Linear(3, 2), CPU)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["betas"] == (0.9, 0.95) and g["lr"] == 1e-3 and g["fused"] for g in optimizer.param_groups)
    assert build_schedule(args) == ScheduleSpec(start_lr=1e-3, decay_style=Decay.COSINE, warmup_iter=2.0, end_iter=8, min_lr=1e-4)
    scheduler = build_scheduler(args, optimizer)
    assert scheduler.on_resume is OnResume.COMPARE and scheduler.get_lr() == [0.0005, 0.0005]
    assert build_scheduler(arguments(override_lr_scheduler=True), optimizer).on_resume is OnResume.CONFIGURED
    assert build_scheduler(arguments(use_checkpoint_lr_scheduler=True), optimizer).on_resume is OnResume.SAVED
    with pytest.raises(ConfigError, match="8-bit"):
        build_optimizer(arguments(use_bnb_optimizer=True), nn.Linear(3, 2), CPU)
