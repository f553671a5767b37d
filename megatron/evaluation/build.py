# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> losses of a checkpoint on the validation and test data, in one process."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.data.batch import Batch
from megatron.data.build import build_data
from megatron.engine.accounting import MetricSum, add_terms, targets_of, weighted_mean
from megatron.errors import ConfigError, required
from megatron.generation.build import load_model
from megatron.hooks.characters import PER_CHARACTER, Characters
from megatron.hooks.validation import with_perplexity
from megatron.log import get_logger
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Groups
from megatron.neox_arguments import NeoXArgs
from megatron.objectives.base import LossTerms, Objective
from megatron.objectives.build import build_objective
from megatron.tokenizer.build import build_tokenizer

log = get_logger(__name__)


@dataclass(frozen=True)
class _Terms:
    """Loss terms of one micro batch by a plain model."""

    model: Transformer

    def __call__(self, objective: Objective, batch: Batch, denominator: Tensor) -> LossTerms:
        """See `Terms` of engine/accounting.py."""
        device = denominator.device
        targets = targets_of(batch, device)
        logits = self.model(batch.tokens.to(device), targets["segments"])
        return objective.loss(logits, targets, denominator)


def evaluate(args: NeoXArgs) -> dict[str, Any]:
    """Losses over `eval_iters` global batches of each of the validation and test splits, for the checkpoint `load` names.

    Returns {"results": {split: {metric: value}}, "config": {...}}. Raises ConfigError when there is nothing to evaluate.
    """
    if args.text.eval_tasks:
        raise ConfigError(
            "evaluation tasks are not built yet", where="eval_tasks", mend="remove eval_tasks: eval.py reports the validation and test loss"
        )
    tokenizer = build_tokenizer(args)
    loaded = load_model(args)
    args = loaded.args
    objective = build_objective(args, eod=tokenizer.eod)
    splits = build_data(args, streams=objective.streams)
    device = next(loaded.model.parameters()).device
    batches = args.run.eval_iters * required(args.run.gradient_accumulation_steps, "gradient_accumulation_steps")
    results, alone = {}, Groups.single()
    for name, split in (("validation", splits.valid), ("test", splits.test)):
        if split is None:
            continue
        micro_batches = islice(split.batches(objective.collate, start_sample=0), batches)
        counting = Characters(tokenizer.decode, tokenizer.eod)
        seen = counting.counted(micro_batches) if args.run.char_level_ppl else micro_batches
        meter = MetricSum()
        weight = add_terms(objective, seen, _Terms(loaded.model), meter, device)
        metrics = weighted_mean(meter, weight, alone, device)
        if args.run.char_level_ppl:
            metrics[PER_CHARACTER] = counting.per_character(alone.dp, device)
        results[name] = with_perplexity(metrics)
        log.info("%s", json.dumps({name: results[name]}))
    if not results:
        raise ConfigError(
            "there is no validation or test data", where="valid_data_paths", mend="give valid_data_paths or split, and eval_iters > 0"
        )
    return {"results": results, "config": {"checkpoint": str(loaded.folder), "eval_iters": args.run.eval_iters}}


def write_results(results: dict[str, Any], path: Path) -> Path:
    """Write `results` as JSON, aside and renamed; returns the path."""
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    aside.write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
    aside.replace(path)
    return path
