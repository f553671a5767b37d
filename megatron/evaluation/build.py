# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> losses of a checkpoint on the validation and test data, at any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatron import fault_injection
from megatron.atomic_io import write_durably
from megatron.data.batch import Batch
from megatron.data.build import build_data
from megatron.engine.loss_normalization import Evaluation, contexts, part_of, targets_of
from megatron.errors import ConfigError, StoppedError, required
from megatron.generation.build import joined, load_model
from megatron.generation.modes import first_signal
from megatron.hooks.validation import PER_CHARACTER, Characters, with_perplexity
from megatron.launch.signals import noting_signals
from megatron.log import get_logger
from megatron.model.transformer import Transformer
from megatron.mpu.collectives import barrier
from megatron.mpu.groups import Groups
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.unfinished import refuse_value
from megatron.objectives.build import build_objective
from megatron.tokenizer.build import build_tokenizer

log = get_logger(__name__)


def evaluate(args: NeoXArgs) -> dict[str, Any]:
    """Losses over `eval_iters` global batches of each of the validation and test splits, for the checkpoint `load` names.

    Returns {"results": {split: {metric: value}}, "config": {...}}. After a signal the split under way is left
    out, and "stopped_by" is its number. Raises ConfigError when there is nothing to evaluate, StoppedError when a signal leaves nothing.
    """
    with joined(args) as (groups, device), noting_signals() as received:
        return _evaluate(args, received, groups, device)


def _evaluate(args: NeoXArgs, received: Sequence[int], groups: Groups, device: torch.device) -> dict[str, Any]:
    refuse_value("eval_tasks", args.text.eval_tasks)
    tokenizer = build_tokenizer(args)
    loaded = load_model(args, groups, device)
    args = loaded.args
    objective = build_objective(args, eod=tokenizer.eod)
    splits = build_data(args, streams=objective.streams, rank=groups.dp.rank, size=groups.dp.size, barrier=lambda: barrier(groups.world))
    batches = args.run.eval_iters * required(args.run.gradient_accumulation_steps, "gradient_accumulation_steps")
    results, stopped = dict[str, dict[str, float]](), dict[str, int]()
    for name, split in (("validation", splits.valid), ("test", splits.test)):
        if split is None:
            continue
        micro_batches = _until_told(
            lambda: first_signal(received, groups.world), islice(split.batches(objective.collate, start_sample=0), batches)
        )
        counting = Characters(tokenizer.decode, tokenizer.eod)
        seen = counting.counted(micro_batches) if args.run.char_level_ppl else micro_batches
        evaluation = Evaluation(objective, device)
        try:
            _read(loaded.model, evaluation, seen, device)
        except StoppedError:
            if not results:
                raise
            stopped = {"stopped_by": first_signal(received, groups.world) or 0}
            break
        metrics = evaluation.metrics(groups)
        if args.run.char_level_ppl:
            metrics[PER_CHARACTER] = counting.per_character(groups.dp, device)
        results[name] = with_perplexity(metrics)
        log.info("%s", json.dumps({name: results[name]}))
    if not results:
        raise ConfigError(
            "there is no validation or test data", where="valid_data_paths", fix="give valid_data_paths or split, and eval_iters > 0"
        )
    return {"results": results, "config": {"checkpoint": str(loaded.folder), "eval_iters": args.run.eval_iters}, **stopped}


def _read(model: Transformer, evaluation: Evaluation, batches: Iterable[Batch], device: torch.device) -> None:
    """Add what the model makes of the batches; all ranks that share it call this."""
    context_of = contexts(evaluation.denominators, model.context)
    with torch.no_grad():
        for batch in (part_of(whole, model.context) for whole in evaluation.counted(batches)):
            targets = targets_of(batch, device)
            logits = model(batch.tokens.to(device), targets["segment_ids"])
            # Of several stages the last one alone has logits, and tells the others the metrics at the end.
            if logits is not None:
                evaluation.read(logits, targets, context_of(batch, targets))


def _until_told(told: Callable[[], int | None], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; raises StoppedError before the next one once a signal came: losses over some of the data are not written."""
    for batch in batches:
        fault_injection.point("evaluate")
        if signal := told():
            raise StoppedError(signal)
        yield batch


def write_results(results: dict[str, Any], path: Path) -> Path:
    """Write `results` as JSON, aside and renamed; returns the path."""
    write_durably(path, json.dumps(results, indent=4) + "\n")
    return path
