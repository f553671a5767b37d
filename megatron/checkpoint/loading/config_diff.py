# SPDX-License-Identifier: Apache-2.0
"""What a resumed run does otherwise than the run that wrote the checkpoint. Knows values by the names of their keys, and no file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron.log import get_logger

log = get_logger(__name__)

SCHEDULE = (
    "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "warmup", "warmup_from_zero", "wsd_decay_fraction",
)  # fmt: skip
"""Keys of the learning rate over time."""

WATCHED = (
    *SCHEDULE,
    "optimizer", "optimizer_type", "weight_decay", "gradient_clipping", "use_mup", "mup_base_hidden_size",
    "train_iters", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "seq_length", "seed",
    "precision", "loss_scale", "zero_stage", "global_num_gpus", "pipe_parallel_size", "model_parallel_size", "context_parallel_size",
    "hidden_dropout", "attention_dropout", "attention_over_documents", "eod_mask_loss", "checkpoint_activations",
    "train_impl", "dataset_impl", "pack_impl", "allow_chopped",
    "dpo_beta", "dpo_reference_free", "kto_beta", "kto_desirable_weight", "kto_undesirable_weight", "z_loss", "kl_impl", "kl_div_beta",
)  # fmt: skip
"""Keys whose change at a resume is told: they decide what is learned, from how much at a time, or in which numbers."""


def watched_values(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a resolved configuration; entries of the optimizer one by one."""
    values = {key: flat[key] for key in WATCHED if key in flat and key != "optimizer"}
    params = (flat.get("optimizer") or {}).get("params") or {}
    return values | {f"optimizer.{name}": value for name, value in params.items() if name not in ("lr", "weight_decay")}


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, without: Collection[str] = ()) -> list[str]:
    """`key: old in the checkpoint, new now` of each value that both know and that differs.

    >>> changes({"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1, "new": 3})
    ['lr: 0.1 in the checkpoint, 0.2 now']
    """
    both = [key for key in now if key in before and key not in without]
    return [f"{key}: {before[key]} in the checkpoint, {now[key]} now" for key in both if _plain(before[key]) != _plain(now[key])]


def tell_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, without: Collection[str] = (), further: Collection[str] = ()
) -> None:
    """One warning with a line for each change, and those of `further`; nothing where there is none."""
    found = list(dict.fromkeys([*changes(before, now, without=without), *further]))
    if found:
        log.warning("this run goes on with other settings than the checkpoint's:\n%s", "\n".join(f"  {line}" for line in found))


def _plain(value: Any) -> Any:
    """Tuples and lists alike, as files do not tell them apart."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
