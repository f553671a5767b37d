# SPDX-License-Identifier: Apache-2.0
"""A few steps of the recorded tiny configuration with measuring hooks, through the engine and by plain torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"
FIXED = {
    # Three layers: with two, the data ranks' shares end where parameters end, and no parameter is cut.
    "num_layers": 3,
    "attention_config": [[["global"], 3]],
    "padded_vocab_size": 512,
    "save": None,
    "extra_save_iters": None,
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": None,
    "gradient_clipping": 0.05,
    "lr_decay_style": "constant",
    "warmup": 0.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-4}},
    "log_param_norm": True,
    "log_grad_norm": True,
    "log_grad_pct_zeros": True,
    "log_optimizer_states": True,
    "log_gradient_noise_scale": True,
    "gradient_noise_scale_n_batches": 2,
}


def arguments(folder: str, **change: Any) -> Any:
    """The configuration; the process moves to where its paths begin."""
    from megatron.neox_arguments import NeoXArgs

    os.chdir(GOLDEN)
    overwrites = {**FIXED, "index_map_dir": folder, **change}
    return NeoXArgs.from_ymls([str(GOLDEN / "neox_pp0" / "config.yml")], overwrites=overwrites)


def measured(
    rank: int, world: int, folder: str, layout: dict[str, Any], steps: int = 2
) -> list[tuple[dict[str, float], dict[str, float], Any]]:
    """(tracker values, row, result) of each step, as the measuring hooks of this rank send them."""
    from megatron.checkpoint.build import CheckpointSource, Take
    from megatron.data.build import build_data
    from megatron.engine.build import build_engine, join_job
    from megatron.hooks.base import TrainState
    from megatron.hooks.build import measures
    from megatron.objectives.build import build_objective

    args = arguments(folder, global_num_gpus=world, **layout)
    groups, device = join_job(args)
    objective = build_objective(args, eod=0)
    data = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size)
    engine, _ = build_engine(args, CheckpointSource(Take.NOTHING), groups, device)
    batches = data.train.batches(objective.collate, start_sample=0)
    values: dict[str, float] = {}
    row: dict[str, float] = {}
    hooks = measures(args, lambda new, columns: (values.update(new), row.update(columns)))
    state = TrainState(target=steps)
    for hook in hooks:
        hook.on_start(state, engine)
    found = []
    for _ in range(steps):
        result = engine.train_step(objective, [next(batches) for _ in range(args.run.gradient_accumulation_steps)])
        for hook in hooks:
            hook.after_step(state, result, engine)
        found.append((dict(values), dict(row), result))
        values.clear()
        row.clear()
    for hook in hooks:
        hook.on_stop(state, engine)
    return found


def by_plain_torch(folder: str, steps: int = 2) -> list[dict[str, Any]]:
    """The same steps without any engine: {kind: {parameter: tensor}} with the gradients before clipping and what follows the update.

    Also "micro_gradients": the gradient of each micro batch of its own mean loss over the batch's tokens, as one flat vector.
    """
    import torch

    from megatron.data.build import build_data
    from megatron.engine.build import join_job
    from megatron.engine.loss_normalization import contexts, step_totals, targets_of
    from megatron.model.build import build_transformer
    from megatron.model.build_spec import build_spec
    from megatron.mpu.context import ContextPlan
    from megatron.objectives.build import build_objective
    from megatron.optim.build import build_optimizer

    args = arguments(folder, global_num_gpus=1)
    groups, device = join_job(args)
    objective = build_objective(args, eod=0)
    data = build_data(args, streams=objective.streams, rank=0, size=1)
    model = build_transformer(args, build_spec(args), groups=groups)
    optimizer = build_optimizer(args, model, device)
    batches = data.train.batches(objective.collate, start_sample=0)
    parameters = dict(model.named_parameters())
    found = []
    for _ in range(steps):
        micro = [next(batches) for _ in range(4)]
        context_of = contexts(step_totals(objective, micro, groups.dp, device).denominators, ContextPlan())
        each = []
        for batch in micro:
            targets = targets_of(batch, device)
            loss = objective.loss(model(batch.tokens, batch.segment_ids), targets, context_of(batch, targets)).loss
            each.append(torch.autograd.grad(loss, list(parameters.values())))
        for parameter, *parts in zip(parameters.values(), *each, strict=True):
            parameter.grad = torch.stack(parts).sum(0)
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), args.optim.gradient_clipping)
        optimizer.step()
        states = {kind: {name: optimizer.state[p][kind].clone() for name, p in parameters.items()} for kind in ("exp_avg", "exp_avg_sq")}
        found.append(
            {
                "gradients": gradients,
                "weights": {name: p.detach().clone() for name, p in parameters.items()},
                **states,
                "micro_gradients": [torch.cat([part.flatten() for part in parts]) * len(micro) for parts in each],
            }
        )
    return found
