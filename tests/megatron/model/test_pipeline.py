# SPDX-License-Identifier: Apache-2.0
"""The plan as DeepSpeed's pipeline module: one stage computes what the plain model computes; two stages train like it."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.errors import ConfigError
from megatron.model.pipeline import PipelineChoices, layers_of, pipeline_module, topology_of
from megatron.model.recompute import Recompute
from megatron.model.spec import Positions, Residual
from megatron.model.transformer import Builder, Transformer
from megatron.mpu.groups import Groups
from support.dist import run_distributed
from support.specs import VOCAB, model_spec

LENGTH, ROWS, ACCUMULATE = 12, 2, 2


def loss_of(handle: Any, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
    labels, weights = targets
    loss: torch.Tensor = handle.nll(labels, weights, float(ROWS * LENGTH))
    return loss


def micro_batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator) for _ in range(ACCUMULATE)]
    segment_ids = torch.tensor([[0] * 7 + [1] * 5, [0] * 12], dtype=torch.int32)
    return [((row, segment_ids), (row.roll(-1, 1), torch.ones(ROWS, LENGTH))) for row in ids]


def test_class_names_match_the_partition_method():
    layers = layers_of(model_spec(layers=3), Builder(initialiser=None, groups=Groups.single()))  # type: ignore[arg-type]
    names = [layer.typename.__name__ if hasattr(layer, "typename") else layer.__name__ for layer in layers]
    assert names == ["Embedding", "gap", *["TransformerBlock"] * 3, "gap", "FinalNorm", "LMHead"]
    assert [bool(re.search("transformer|mlp", name, re.IGNORECASE)) for name in names] == [False] * 2 + [True] * 3 + [False] * 3


def train(rank: int, world: int, folder: str) -> list[float]:
    """Two steps of SGD on one process per stage, for a tied and an untied model; losses, and weights that equal the plain model's."""
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile its shared memory collectives at this point.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    losses = []
    for tied in (False, True):
        spec = model_spec(residual=Residual.PARALLEL, tied=tied)
        choices = PipelineChoices(recompute=Recompute() if tied else None)
        module = pipeline_module(spec, topology=topology_of(world, 1, 1), loss_fn=loss_of, groups=Groups.single(), seed=4, choices=choices)
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": ACCUMULATE,
            "gradient_clipping": 0.0,
            "steps_per_print": 1000,
        }
        engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.2), config=config)
        plain = Transformer(spec, seed=4)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.2)
        for _ in range(2):
            losses.append(float(engine.train_batch(iter(micro_batches())).detach()))
            total = 0.0
            for (ids, segment_ids), targets in micro_batches():
                loss = plain(ids, segment_ids, read=lambda handle, targets=targets: loss_of(handle, targets)) / ACCUMULATE
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            assert abs(losses[-1] - total) < 1e-5
        engine.save_checkpoint(folder, tag=f"tied_{tied}")
        dist.barrier()
        stored = sorted(path.name for path in (Path(folder) / f"tied_{tied}").glob("layer_*"))
        numbers = [0, 2, 3, 5] if tied else [0, 2, 3, 5, 6]
        assert stored == [f"layer_{number:02d}-model_00-model_states.pt" for number in numbers]
        for number, name in zip(numbers, stored, strict=True):
            state = torch.load(Path(folder) / f"tied_{tied}" / name, weights_only=True)
            for key, tensor in plain.sequential[str(number)].state_dict().items():
                torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6)
    return losses


@pytest.mark.dist
@pytest.mark.timeout(150)
@pytest.mark.parametrize("stages", [1, 2])
def test_trains_like_the_plain_model(stages: int, tmp_path: Path):
    losses = run_distributed(train, world=stages, timeout_s=100.0, init=False, folder=str(tmp_path))
    assert losses[0] == pytest.approx(losses[-1])


def test_a_shared_position_table_stays_on_one_stage():
    assert "RANK" not in os.environ
    with pytest.raises(ConfigError, match="relative position table"):
        pipeline_module(model_spec(positions=Positions.RPE), topology=topology_of(2, 1, 1), loss_fn=loss_of, groups=Groups.single())
