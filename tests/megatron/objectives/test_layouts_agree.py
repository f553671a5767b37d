# SPDX-License-Identifier: Apache-2.0
"""One loss and one gradient at every layout, packed or padded: of a token mean, a document mean, and DPO against a frozen reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.dist import run_distributed
from support.tiny import tiny

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipe_parallel_size": 2},
    **{f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)},
}
PLAN = (
    ("token mean, packed", "LanguageModel", "packed", 1),
    ("document mean, packed", "DocumentMean", "packed", 2),
    ("DPO, packed", "DPO", "packed", 1),
    ("DPO, padded", "DPO", "padded", 1),
    ("document mean, padded", "DocumentMean", "padded", 4),
)
"""Steps: what, the objective, its batches, and rows (packed) or pairs (padded) in each: each step has another number of micro batches."""

REPACKED = (
    ("token mean, packed", "LanguageModel", "padded", 2),
    ("document mean, packed", "DocumentMean", "padded", 1),
    ("DPO, packed", "DPO", "padded", 4),
    ("DPO, padded", "DPO", "packed", 2),
    ("document mean, padded", "DocumentMean", "packed", 1),
)
"""The same with packed and padded rows exchanged."""


def config(world: int, **layout: Any) -> dict[str, Any]:
    """A tiny model; SGD, since Adam's first steps would make much of rounding."""
    common: dict[str, Any] = {
        "global_num_gpus": world,
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": None,
        "seq_length": 32,
        "padded_vocab_size": 128,
        "attention_over_documents": "isolated",
        "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
        "lr_decay_style": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "gradient_clipping": 0.0,
        "train_data_paths": ["unused"],
    }
    return tiny("neox", **{**common, **layout})


class Trial:
    """One engine at one layout, from the same initial weights."""

    def __init__(self, world: int, layout: dict[str, Any]) -> None:
        from megatron.checkpoint.build import CheckpointSource, Take
        from megatron.engine.build import build_engine, join_job
        from megatron.neox_arguments import NeoXArgs
        from support.reshard import forget_groups

        forget_groups()
        args = NeoXArgs.from_dict(config(world, **layout))
        self.groups, device = join_job(args)
        self.engine, self.spec = build_engine(args, CheckpointSource(Take.NOTHING), self.groups, device)
        self.gradients: dict[str, Any] = {}
        self.engine.before_update(self._gather)

    def own(self, batches: list[Any]) -> list[Any]:
        """This data rank's batches."""
        return batches[self.groups.dp.rank :: self.groups.dp.size]

    def run(self, plan: Any) -> dict[str, Any]:
        """Loss, metrics and gradients of each step, and the scores of all documents at the start."""
        from megatron.objectives.language_model import LanguageModel
        from support import toy_objectives
        from support.toy_objectives import DPO, PAIRS, DocumentMean, document_logps, packed, padded

        dpo = DPO()
        objectives = {"LanguageModel": LanguageModel(eod=0), "DocumentMean": DocumentMean(), "DPO": dpo}
        for rows in sorted({(kind, rows) for _, _, kind, rows in plan}):
            dpo.remember(self.own(getattr(toy_objectives, rows[0])(rows[1])), self.engine)
        found: dict[str, Any] = {
            "scores": [values.tolist() for values in self.engine.score(padded(2), document_logps)],
            "tokens": self.engine.score(packed(4), token_logps)[0].numpy(),
        }
        for name, objective, kind, rows in plan:
            batches = self.own(getattr(toy_objectives, kind)(rows))
            before = dict(self.engine.eval_step(objectives[objective], batches))
            result = self.engine.train_step(objectives[objective], batches)
            assert result.samples == PAIRS and result.tokens - result.padding == sum(
                len(ids) for pair in toy_objectives.pairs() for ids in pair
            )
            assert before == pytest.approx(dict(result.metrics), rel=1e-5)
            found[name] = {"loss": result.loss, "metrics": dict(result.metrics), "gradients": self.gradients}
        return found

    def _gather(self) -> None:
        """Every gradient of the whole model, from the shards of all ranks."""
        from megatron.checkpoint.formats.torch_file import canonical_name
        from megatron.mpu.collectives import of_all_ranks
        from support.reshard import _whole

        shards, mine = self.engine.local_shards(), {}
        for name, parameter in self.engine.module().named_parameters():
            grad = shards.gradient(parameter)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            mine[canonical_name(name), "grad"] = (shape, grad.float().flatten().numpy().copy())
        groups = self.groups
        place = (groups.pp.rank, groups.tp.rank, groups.replicas.rank)
        self.gradients = _whole(of_all_ranks((place, mine), groups.world), self.spec, groups.tp.size, shards.sharded)


def token_logps(logits: Any, targets: Any, context: Any) -> Any:
    """Log-prob of every token, of whole rows."""
    return context.gather_tokens(logits.token_logps(targets["labels"], targets["loss_weight"] != 0))


def alone(rank: int, world: int) -> list[dict[str, Any]]:
    """One rank: as planned, and repacked."""
    return [Trial(world, {}).run(plan) for plan in (PLAN, REPACKED)]


def at_every_layout(rank: int, world: int) -> dict[str, Any]:
    """Two ranks, shared in every way; and what is said to a loss that sums a part of the sequence."""
    from megatron.errors import TrainingError
    from support.toy_objectives import RowMean, packed

    found = {}
    for name, layout in LAYOUTS.items():
        trial = Trial(world, layout)
        found[name] = trial.run(PLAN)
        if name == "context":
            with pytest.raises(TrainingError) as caught:
                trial.engine.train_step(RowMean(), packed(1))
            found["said"] = str(caught.value)
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Losses within 1e-6, gradients within 1e-5 of the largest."""
    for step, what in expected.items():
        if step in ("scores", "tokens"):
            np.testing.assert_allclose(
                np.array(sum(found[step], [])) if step == "scores" else found[step],
                np.array(sum(what, [])) if step == "scores" else what,
                rtol=1e-5,
                atol=1e-5,
                err_msg=name,
            )
            continue
        assert found[step]["loss"] == pytest.approx(what["loss"], rel=1e-6, abs=1e-6), (name, step)
        assert found[step]["metrics"] == pytest.approx(what["metrics"], rel=1e-5, abs=1e-5), (name, step)
        assert found[step]["gradients"].keys() == what["gradients"].keys()
        for key, value in what["gradients"].items():
            error = np.abs(found[step]["gradients"][key] - value).max() / max(np.abs(value).max(), 1e-3)
            assert error < 1e-5, (name, step, key, error)


@pytest.mark.dist
@pytest.mark.timeout(240)
def test_losses_and_gradients_are_those_of_one_rank(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ((whole, repacked),) = run_distributed(alone, 1, 100, init=False)
    assert_same(repacked, whole, "repacked")
    assert whole["DPO, packed"]["metrics"]["margin"] != 0.0
    for rank in run_distributed(at_every_layout, 2, 200, init=False):
        assert "ranks that share the same sequences made different values of them: loss" in rank["said"]
        for name in LAYOUTS:
            assert_same(rank[name], whole, name)
