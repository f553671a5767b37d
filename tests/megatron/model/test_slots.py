# SPDX-License-Identifier: Apache-2.0
"""A mixer and a feed-forward of somebody else's, known only to this file and to the table, work wherever ours do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megatron.errors import ConfigError
from megatron.model import slots
from megatron.model.attention.layer import mean_visible
from megatron.model.layer_state import FeedForward, LayerCache, Mixer
from megatron.model.mlp import MLP
from megatron.model.recompute import Granularity, Recompute
from megatron.model.slots import matmul_flops_per_token, parameter_count, reported_flops_per_step
from megatron.model.spec import BackendName, BlockSpec, MLPSpec, ModelSpec, NormKind, Positions, Residual
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
from megatron.mpu.layers import ColumnLinear, RowLinear
from megatron.mpu.sharding import Initial, InitialValue, Sharding, Split, local_size
from support.dist import run_distributed
from support.specs import HIDDEN, LENGTH, VOCAB, attention_spec, model_spec, norm_spec


@dataclass(frozen=True, kw_only=True)
class DecaySpec:
    hidden_size: int
    width: int


class DecayCache(LayerCache):
    """The state after the last token, [b, width / tp]."""

    def __init__(self, rows: int, max_len: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(rows, max_len, device)
        self.state = torch.zeros(rows, width, dtype=dtype, device=device)


class Decay(Mixer):
    """state <- a state + (1 - a) value, out = gate * state, with one learned decay a for each feature."""

    def __init__(self, spec: DecaySpec, *, tp: Group, defer_reduce: bool = False, context: Any = None) -> None:
        super().__init__()
        local, first = local_size(spec.width, tp.size, "width"), tp.rank * (spec.width // tp.size)
        self.inputs = ColumnLinear(spec.hidden_size, 2 * spec.width, tp=tp, parts=(spec.width, spec.width))
        self.outputs = RowLinear(spec.width, spec.hidden_size, tp=tp, defer_reduce=defer_reduce)
        self.a_log = nn.Parameter((torch.arange(first, first + local).float()[None] + 1).log())  # a matrix that is its own constant
        self.noise = nn.Parameter(torch.empty(local))

    def forward(self, hidden: Tensor, segment_ids: Any = None, cache: DecayCache | None = None) -> Tensor:
        value, gate = self.inputs(hidden).chunk(2, dim=-1)
        decay, value = torch.exp(-1 / self.a_log.exp())[0], value + self.noise
        state = torch.zeros_like(value[:, 0]) if cache is None else cache.state
        states = []
        for step in value.unbind(1):
            state = decay * state + (1 - decay) * step
            states.append(state)
        if cache is not None:
            cache.advance(value.shape[1])
            cache.state = state
        return self.outputs(torch.stack(states, 1) * gate.sigmoid())

    def initial_values(self) -> Mapping[str, InitialValue]:
        return {"a_log": Initial.KEEP, "noise": lambda whole, generator: whole.uniform_(1.0, 2.0, generator=generator)}

    def sharding(self) -> dict[str, Sharding]:
        return {"a_log": Split(1), "noise": Split(0)}

    def allocate_cache(self, rows: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> DecayCache:
        return DecayCache(rows, max_len, self.noise.numel(), dtype, device)

    @staticmethod
    def parameter_count(spec: DecaySpec) -> int:
        return 3 * spec.hidden_size * spec.width + 2 * spec.width + spec.hidden_size + 2 * spec.width

    @staticmethod
    def forward_flops(spec: DecaySpec, length: int) -> float:
        return 6.0 * spec.hidden_size * spec.width


@dataclass(frozen=True, kw_only=True)
class BalancedSpec:
    mlp: MLPSpec


class Balanced(FeedForward):
    """An MLP that wants small outputs, and says so to the loss."""

    adds_aux = True

    def __init__(self, spec: BalancedSpec, *, tp: Group, defer_reduce: bool = False) -> None:
        super().__init__()
        self.inner = MLP(spec.mlp, tp=tp, defer_reduce=defer_reduce)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(hidden)
        return out, 0.5 * out.float().square().mean()

    @staticmethod
    def parameter_count(spec: BalancedSpec) -> int:
        return MLP.parameter_count(spec.mlp)

    @staticmethod
    def forward_flops(spec: BalancedSpec, length: int) -> float:
        return MLP.forward_flops(spec.mlp, length)


def register() -> None:
    slots.MIXERS[DecaySpec] = Decay
    slots.FEED_FORWARDS[BalancedSpec] = Balanced


@contextmanager
def registered() -> Any:
    before = dict(slots.MIXERS), dict(slots.FEED_FORWARDS)
    register()
    yield
    for table, kept in zip((slots.MIXERS, slots.FEED_FORWARDS), before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture(autouse=True)
def _table() -> Any:
    with registered():
        yield


def toy_spec(residual: Residual = Residual.SEQUENTIAL, layers: int = 3) -> ModelSpec:
    """The toys, and in the middle a layer of ours."""
    plain = MLPSpec(hidden_size=HIDDEN, width=48, activation="gelu")
    toys = BlockSpec(mixer=DecaySpec(hidden_size=HIDDEN, width=24), ffn=BalancedSpec(mlp=plain), norm=norm_spec(), residual=residual)
    ours = replace(toys, mixer=attention_spec(), ffn=plain)
    return replace(model_spec(layers=layers), blocks=tuple(ours if index == 1 else toys for index in range(layers)))


def total(logits: Any, labels: Tensor) -> Tensor:
    return logits.nll(labels, torch.ones(labels.shape), labels.numel()) + logits.aux


def batch(seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def test_a_slot_says_how_it_starts_what_it_has_and_what_it_costs() -> None:
    model, spec = Transformer(toy_spec()), toy_spec()
    decay = model.blocks[0].mixer
    torch.testing.assert_close(decay.a_log, torch.arange(1.0, 25.0).log()[None], rtol=0, atol=0)
    assert ((decay.noise >= 1) & (decay.noise < 2)).all() and decay.noise.std() > 0.1
    assert parameter_count(spec) == sum(parameter.numel() for parameter in model.parameters())
    shards = [Transformer(spec, groups=Groups(tp=Group(rank=rank, size=2))).blocks[0].mixer for rank in range(2)]
    assert torch.equal(torch.cat([shard.noise for shard in shards]), decay.noise)
    other = replace(spec, blocks=(spec.blocks[1],) * 3)
    saved = 2 * 3 * (slots.slots_of(spec.blocks[1])[0][0].forward_flops(spec.blocks[1].mixer, LENGTH) - 6.0 * HIDDEN * 24)
    assert matmul_flops_per_token(other) - matmul_flops_per_token(spec) == pytest.approx(saved)


def test_an_unknown_slot_and_a_shared_row_are_refused() -> None:
    spec = toy_spec()
    with pytest.raises(ConfigError, match="needs whole rows"):
        slots.context_plan(spec, Groups(cp=Group(rank=0, size=2)))
    slots.MIXERS.pop(DecaySpec)
    with pytest.raises(ConfigError, match="no module is known for DecaySpec"):
        Transformer(spec)


@pytest.mark.parametrize("residual", Residual)
def test_training_with_and_without_recomputation(residual: Residual) -> None:
    found = []
    ways = [None, *(Recompute(num_layers=size, granularity=kind) for kind in Granularity for size in (1, 2))]
    for way in ways:
        model = Transformer(toy_spec(residual), recompute=way, seed=5)
        ids = batch()
        with_aux = model(ids, read=lambda logits, ids=ids: (logits.aux, total(logits, ids)))
        assert with_aux[0].shape == () and with_aux[0].dtype == torch.float32 and float(with_aux[0].detach()) > 0
        found.append([with_aux[0].detach(), *torch.autograd.grad(with_aux[1], list(model.parameters()))])
    for other in found[1:]:
        for ours, first in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-5, atol=1e-6)


def test_decoding_with_a_cache_and_a_checkpoint() -> None:
    model, ids = Transformer(toy_spec(), seed=5).eval(), batch()
    with torch.no_grad():
        whole = model(ids).full()
        cache = model.allocate_cache(2, LENGTH)
        parts = [model(ids[:, start:end], cache=cache).full() for start, end in ((0, 7), (7, 8), (8, LENGTH))]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        again = Transformer(toy_spec(), seed=6).eval()
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(again(ids).full(), whole)


def in_stages(rank: int, world: int, folder: str) -> float:
    """Two steps over stages; losses and the weights in the layer files are the plain model's."""
    import deepspeed
    import deepspeed.ops

    from megatron.model.pipeline import PipelineChoices, pipeline_module, topology_of

    register()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    choices = PipelineChoices(partition_method="type:transformer", recompute=Recompute())
    module = pipeline_module(
        toy_spec(layers=4),
        topology=topology_of(world, 1, 1),
        loss_fn=lambda logits, targets: total(logits, targets[0]),
        groups=Groups.single(),
        seed=4,
        choices=choices,
    )
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0, "steps_per_print": 1000}
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.2), config=config)
    plain = Transformer(toy_spec(layers=4), seed=4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2)
    segment_ids = torch.zeros(2, LENGTH, dtype=torch.int32)
    loss = 0.0
    for _ in range(2):
        inputs = [((batch(seed), segment_ids), (batch(seed).roll(-1, 1),)) for seed in (1, 2)]
        loss, expected = float(engine.train_batch(iter(inputs)).detach()), 0.0
        for (ids, _), (labels,) in inputs:
            one = plain(ids, read=lambda logits, labels=labels: total(logits, labels)) / 2
            one.backward()
            expected += float(one.detach())
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss - expected) < 1e-5
    engine.save_checkpoint(folder, tag="toys")
    dist.barrier()
    for number, layer in plain.sequential.items():
        state = torch.load(Path(folder) / "toys" / f"layer_{int(number):02d}-model_00-model_states.pt", weights_only=True)
        assert set(state) == set(layer.state_dict())
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)
    return loss


@pytest.mark.dist
@pytest.mark.timeout(150)
def test_two_pipeline_stages_train_like_the_plain_model(tmp_path: Path) -> None:
    losses = run_distributed(in_stages, world=2, timeout_s=100.0, init=False, folder=str(tmp_path))
    assert losses[0] == pytest.approx(losses[1])


def with_toys(spec: ModelSpec) -> ModelSpec:
    """A configured model whose first layer is of the toys."""
    first = replace(spec.blocks[0], mixer=DecaySpec(hidden_size=spec.hidden_size, width=24), ffn=BalancedSpec(mlp=spec.blocks[0].ffn))
    return replace(spec, blocks=(first, *spec.blocks[1:]))


def trained(rank: int, world: int, folder: str) -> dict[str, list[float]]:
    """Losses by iteration of whole runs: six steps of two tensor ranks; four, two more, and two more over two stages."""
    import json

    from megatron.checkpoint import build as opening
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain
    from support.jobs import settings

    register()
    plain = opening.build_spec
    opening.build_spec = lambda *args, **kwargs: with_toys(plain(*args, **kwargs))

    def losses(name: str, load: str, steps: int, **layout: Any) -> list[float]:
        place = {"save": f"{folder}/{name}", "load": f"{folder}/{load}", "train_iters": steps, "lr_decay_iters": 8}
        fixed = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "checkpoint_activations": True}
        pretrain(NeoXArgs.from_dict(settings(Path(folder), world, **{**place, **fixed, **layout})))
        rows = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
        return [row["lm_loss"] for row in rows if "lm_loss" in row]

    two = {"model_parallel_size": 2}
    return {
        "whole": losses("whole", "whole", 6, **two),
        "first": losses("parts", "parts", 4, **two),
        "more": losses("parts", "parts", 6, **two)[4:],
        "whole, more": losses("whole", "whole", 8, **two)[6:],
        "stages": losses("stages", "parts", 8, pipe_parallel_size=2),
    }


@pytest.mark.dist
@pytest.mark.timeout(150)
def test_whole_runs_resume_and_change_their_layout(tmp_path: Path) -> None:
    """From the configuration to the checkpoint and back, optimizer included, as any other layer."""
    for found in run_distributed(trained, world=2, timeout_s=120.0, init=False, folder=str(tmp_path)):
        assert found["first"] + found["more"] == found["whole"]
        assert len(set(found["whole"])) == 6
        assert found["stages"] == pytest.approx(found["whole, more"], rel=1e-5)


QK = {"qk_norm": norm_spec(size=8)}
SPECS = [
    *(model_spec(residual=residual) for residual in Residual),
    *(model_spec(positions=positions, tied=True) for positions in Positions),
    *(model_spec(norm=norm_spec(kind)) for kind in NormKind),
    model_spec(norm=norm_spec(bias=False), ffn=MLPSpec(hidden_size=HIDDEN, width=24, activation="swiglu", bias=False)),
    model_spec(attention={"num_kv_heads": 1, "bias": False}),
    model_spec(positions=Positions.LEARNED, embedding={"position_offset": 2}),
    model_spec(attention=QK),
    model_spec(attention={"num_kv_heads": 2, "separate_qk_norms": True, "qk_norm": norm_spec(NormKind.RMSNORM, size=8)}),
    model_spec(attention={"head_dim": 12, "rotary": None, "dense_bias": False, "separate_qk_norms": True, "norm_each_head": True, **QK}),
]


def test_parameter_count_is_the_module_s():
    for spec in SPECS:
        assert parameter_count(spec) == sum(parameter.numel() for parameter in Transformer(spec, device="meta").parameters())


@pytest.mark.parametrize("window", [None, 0, 3, 30])
def test_mean_visible(window: int | None):
    seen = [min(position, position if window is None else window) + 1 for position in range(10)]
    assert mean_visible(10, window) == pytest.approx(sum(seen) / 10)


def test_matmul_flops_are_those_that_torch_counts():
    """The eager back end forms all scores, also the masked half, so the counter sees t tokens where (t + 1) / 2 are needed."""
    length = 24
    for changes in ({}, {"num_kv_heads": 2}):
        mlp = MLPSpec(hidden_size=HIDDEN, width=40, activation="swiglu", bias=False)
        spec = model_spec(ffn=mlp, attention={"bias": False, "backend": BackendName.EAGER, **changes})
        model = Transformer(spec)
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, length, dtype=torch.int64)).full().sum().backward()
        masked = 3 * spec.num_layers * 4 * HIDDEN * (length - (length + 1) / 2)
        assert counter.get_total_flops() / length == pytest.approx(matmul_flops_per_token(spec) + masked, rel=1e-6)


def test_recomputation_costs_a_forward_of_the_blocks():
    spec = model_spec()
    head = 2.0 * HIDDEN * spec.vocab_size
    forward = matmul_flops_per_token(spec) / 3 - head
    assert matmul_flops_per_token(spec, recompute=True) == pytest.approx(4 * forward + 3 * head)


def test_reported_flops_are_the_formula_s():
    spec = model_spec(layers=2)
    b, s, h, v, layers = 8, 24, 32, 64, 2
    expected = 24 * 3 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert reported_flops_per_step(spec, batch=b, recompute=False) == pytest.approx(expected)
    assert reported_flops_per_step(spec, batch=b, recompute=True) == pytest.approx(expected * 4 / 3)
