# SPDX-License-Identifier: Apache-2.0
"""Recomputation: the same gradients to the last bit, dropout included, with less kept, in all forms of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from megatron.model.recompute import Granularity, Offloaded, Recompute, draws, keeps, offload, reload
from megatron.model.spec import MLPSpec, ModelSpec, NormKind, Positions, Residual
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
from support.dist import run_distributed
from support.specs import HIDDEN, VOCAB, model_spec, norm_spec

LAYERS, LENGTH = 5, 12
SELECTIVE = Granularity.SELECTIVE
WAYS = {
    "full 1": Recompute(),
    "full 2": Recompute(num_layers=2),
    "full 3": Recompute(num_layers=3),
    "full 9": Recompute(num_layers=9),
    "selective 1": Recompute(granularity=SELECTIVE),
    "selective 2": Recompute(granularity=SELECTIVE, num_layers=2),
    "host": Recompute(on_host=True),
    "partitioned": Recompute(partitioned=True),
    "partitioned 2, host": Recompute(num_layers=2, partitioned=True, on_host=True),
}


def spec_of(form: str, hidden_dropout: float = 0.3, dropout: float = 0.2) -> ModelSpec:
    spec = {
        "neox": lambda: model_spec(layers=LAYERS, residual=Residual.PARALLEL),
        "gpt2": lambda: model_spec(layers=LAYERS, positions=Positions.LEARNED, tied=True),
        "llama": lambda: model_spec(
            layers=LAYERS,
            norm=norm_spec(NormKind.RMSNORM),
            ffn=MLPSpec(hidden_size=HIDDEN, width=40, activation="swiglu", bias=False),
            attention={"num_kv_heads": 2, "bias": False, "window": 5, "isolated": True},
        ),
        "rpe": lambda: model_spec(layers=LAYERS, positions=Positions.RPE, residual=Residual.PARALLEL_TIED),
        "olmo": lambda: model_spec(layers=LAYERS, residual=Residual.POST_SUBLAYER),
    }[form]()
    block = spec.blocks[0]
    return replace(spec, blocks=(replace(block, hidden_dropout=hidden_dropout, mixer=replace(block.attention, dropout=dropout)),) * LAYERS)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    return ids, torch.tensor([[0] * 7 + [1] * 5, [0] * LENGTH], dtype=torch.int32)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def gradients(model: Transformer) -> tuple[list[torch.Tensor], Counter[str]]:
    """Gradients of all parameters, the random state afterwards, and what the backward pass ran."""
    ids, segment_ids = batch()
    torch.manual_seed(9)
    loss = model(ids, segment_ids, read=lambda logits: logits.nll(ids.roll(-1, 1), torch.ones(ids.shape), ids.numel()))
    with Operations() as seen:
        found = torch.autograd.grad(loss, list(model.parameters()))
    return [*found, torch.get_rng_state()], seen.count


def equal(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("form", ["neox", "gpt2", "llama", "rpe", "olmo"])
def test_gradients_are_those_of_kept_activations(form: str) -> None:
    spec = spec_of(form)
    truth, _ = gradients(Transformer(spec))
    assert not equal(gradients(Transformer(spec_of(form, 0.0)))[0], truth), "dropout must matter"
    for name, how in WAYS.items():
        assert equal(gradients(Transformer(spec, recompute=how))[0], truth), name


def test_selective_repeats_no_weight_product_and_no_attention() -> None:
    for form in ("neox", "llama"):
        spec = spec_of(form, dropout=0.0)
        seen = {name: gradients(Transformer(spec, recompute=how))[1] for name, how in {"none": None, **WAYS}.items()}
        products, attention = "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"
        for name in ("selective 1", "selective 2"):
            assert seen[name]["aten::addmm"] == seen["none"]["aten::addmm"] == 0
            assert seen[name][products] == seen["none"][products]
            assert seen[name][attention] == seen["none"][attention] == 0
            assert seen[name]["aten::bernoulli_"] == 2 * LAYERS and seen["none"]["aten::bernoulli_"] == 0
        again = seen["full 1"][products] + seen["full 1"]["aten::addmm"] - seen["none"][products]
        assert again == 4 * LAYERS and seen["full 1"][attention] >= LAYERS


class Live(TorchDispatchMode):
    """Remembers every storage made, to tell how many bytes are alive later."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef

        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                ref = StorageWeakRef(x.untyped_storage())
                self.made[ref.cdata] = (ref, x.untyped_storage().nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def test_less_is_kept_the_more_is_recomputed() -> None:
    ids, _ = batch()
    held = {}
    for name, how in {"none": None, **WAYS}.items():
        model = Transformer(spec_of("neox", dropout=0.0), recompute=how)
        with Live() as live:
            loss = model(ids, read=lambda logits: logits.nll(ids.roll(-1, 1), torch.ones(ids.shape), ids.numel()))
            held[name] = live.bytes()
        loss.backward()
    inputs = ids.numel() * HIDDEN * 4
    outside = held["full 9"] - inputs
    none, selective, full = (held[name] - outside for name in ("none", "selective 1", "full 1"))
    assert none > 1.5 * selective and selective > 3 * full
    assert full == pytest.approx(LAYERS * inputs, abs=inputs / 2)
    assert held["full 1"] - held["full 3"] == pytest.approx(3 * inputs, abs=inputs / 2)
    assert held["full 2"] - held["full 3"] == pytest.approx(inputs, abs=inputs / 2)


def test_a_kernel_that_draws_is_run_again() -> None:
    """Offloaded, it would not draw in the recomputation, and the masks that follow would differ."""
    aten = torch.ops.aten
    x = torch.zeros(1)
    assert not draws(aten._scaled_dot_product_flash_attention.default, (x, x, x), {})
    assert not draws(aten._scaled_dot_product_flash_attention.default, (x, x, x, 0.0, True), {})
    for args, kwargs in (((x, x, x, 0.1, True), {}), ((x, x, x), {"dropout_p": 0.1})):
        assert draws(aten._scaled_dot_product_flash_attention.default, args, kwargs)
        assert keeps(None, aten._scaled_dot_product_flash_attention.default, *args, **kwargs) is CheckpointPolicy.PREFER_RECOMPUTE
    assert draws(aten._scaled_dot_product_efficient_attention.default, (x, x, x, None, True, 0.1), {})
    assert keeps(None, aten._scaled_dot_product_efficient_attention.default, x, x, x, None, True) is CheckpointPolicy.MUST_SAVE
    assert keeps(None, aten.mm.default, x, x) is CheckpointPolicy.MUST_SAVE
    for op in (aten.bmm.default, aten.native_dropout.default, aten.gelu.default, aten.native_layer_norm.default):
        assert keeps(None, op, x, x) is CheckpointPolicy.PREFER_RECOMPUTE


def test_compiled_blocks_are_recomputed_too() -> None:
    spec = spec_of("llama", 0.0, 0.0)
    ids, segment_ids = batch()
    truth, _ = gradients(Transformer(spec))
    for how in (Recompute(num_layers=2), Recompute(on_host=True)):
        model = Transformer(spec, recompute=how)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        loss = model(ids, segment_ids, read=lambda logits: logits.nll(ids.roll(-1, 1), torch.ones(ids.shape), ids.numel()))
        for ours, kept in zip(torch.autograd.grad(loss, list(model.parameters())), truth[:-1], strict=True):
            torch.testing.assert_close(ours, kept, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_inputs_wait_in_pinned_memory() -> None:
    x = torch.randn(2, 3, 4, device="cuda")
    kept = offload(x, group=Group.single(), on_host=True)
    assert isinstance(kept, Offloaded) and kept.data.is_pinned() and kept.device == x.device
    assert torch.equal(reload(kept, group=Group.single()), x)


COLLECTIVES = ("all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter")


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    """Of this rank: which ways have the gradients of kept activations; collectives of the backward pass; what is kept of an input."""
    from megatron.mpu.comm import open_groups
    from megatron.mpu.groups import Topology

    right, calls = {}, {}
    for sequence, form in ((False, "neox"), (False, "gpt2"), (True, "llama")):
        groups: Groups = open_groups(Topology(tensor=world), rank, sequence=sequence)
        truth: list[torch.Tensor] = []
        for name, how in {"none": None, **WAYS}.items():
            ours, seen = gradients(Transformer(spec_of(form), groups=groups, recompute=how))
            truth = truth or ours
            right[form, name] = equal(ours, truth)
            calls[form, name] = sum(number for op, number in seen.items() if any(kind in op for kind in COLLECTIVES))
    x = torch.arange(15.0).view(1, 3, 5)
    kept, numbers = (offload(x, group=groups.tp, on_host=False) for x in (x, x.int()))
    assert isinstance(kept, Offloaded)
    back = reload(kept, group=groups.tp)
    bytes_ = kept.data.untyped_storage().nbytes()
    return {"right": right, "calls": calls, "bytes": bytes_, "back": torch.equal(back, x), "numbers": type(numbers) is torch.Tensor}


@pytest.mark.dist
def test_two_tensor_parallel_ranks() -> None:
    """Dropout that differs between the ranks is repeated; a kept input is half of it, and whole again where it is needed."""
    for found in run_distributed(tensor_parallel, world=2, timeout_s=100):
        assert all(found["right"].values()), found["right"]
        assert found["bytes"] == 8 * 4 and found["back"] and found["numbers"]
        calls = found["calls"]
        assert calls["gpt2", "selective 1"] == calls["gpt2", "selective 2"] == calls["gpt2", "none"] < calls["gpt2", "full 1"]
        # Where the sequence is spread, the two gatherings of a layer are repeated.
        assert calls["llama", "selective 1"] == calls["llama", "none"] + 2 * LAYERS < calls["llama", "full 1"]
        assert calls["gpt2", "partitioned"] == calls["gpt2", "full 1"] + LAYERS
        assert calls["llama", "partitioned"] == calls["llama", "full 1"]


HOW = [None, *WAYS.values()]


def loss_of(handle: Any, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
    labels, weights = targets
    loss: torch.Tensor = handle.nll(labels, weights, float(labels.numel()))
    return loss


def staged(rank: int, world: int) -> list[list[torch.Tensor]]:
    """For each way: this stage's weights after two steps of a pipeline with dropout; and the lengths of the spans it ran."""
    import deepspeed
    import deepspeed.ops

    from megatron.model import recompute
    from megatron.model.pipeline import PipelineChoices, pipeline_module, topology_of

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    ids, segment_ids = batch()
    step = [
        ((ids, segment_ids), (ids.roll(-1, 1), torch.ones(ids.shape))),
        ((ids.flip(1), segment_ids), (ids.roll(1, 1), torch.ones(ids.shape))),
    ]
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "steps_per_print": 1000}
    results = []
    run_span, lengths = recompute.run_span, []
    recompute.run_span = lambda blocks, *rest: (lengths.append(len(blocks)), run_span(blocks, *rest))[1]
    for how in HOW:
        module = pipeline_module(
            spec_of("llama"),
            topology=topology_of(world, 1, 1),
            loss_fn=loss_of,
            groups=Groups.single(),
            choices=PipelineChoices(recompute=how),
        )
        engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.2), config=config)
        torch.manual_seed(rank)
        lengths.clear()
        for _ in range(2):
            engine.train_batch(iter(step))
        results.append([*(p.detach().clone() for p in module.parameters()), torch.tensor(lengths)])
    return results


@pytest.mark.dist
@pytest.mark.timeout(150)
@pytest.mark.parametrize("stages", [1, 2])
def test_stages_of_a_pipeline(stages: int) -> None:
    """A span counts blocks from the first one of its stage, whatever stands before and behind them."""
    for rank, (truth, *ways) in enumerate(run_distributed(staged, world=stages, timeout_s=120, init=False)):
        blocks = LAYERS if stages == 1 else (3, 2)[rank]
        for (name, how), ours in zip(WAYS.items(), ways, strict=True):
            assert equal(ours[:-1], truth[:-1]), name
            spans = [min(how.num_layers, blocks - start) for start in range(0, blocks, how.num_layers)]
            assert Counter(ours[-1].tolist()) == Counter(spans * 2 * 4), name  # forward and again, for four micro batches
        assert truth[-1].tolist() == [blocks] * 4


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_zero_3(tmp_path: Path) -> None:
    """Parameters that are in parts on two ranks between the passes: losses and gradient norms of three steps."""
    train = "tests/megatron/engine/test_data_parallel.py::losses_of"
    # Parameters this small would stay whole; 0 divides all of them.
    layout = {"hidden_dropout": 0.2, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    kept, again = (
        run_distributed(train, world=2, timeout_s=90, init=False, folder=str(tmp_path), layout={**layout, "checkpoint_activations": on})
        for on in (False, True)
    )
    assert again == kept
