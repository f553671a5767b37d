# SPDX-License-Identifier: Apache-2.0
"""What a run needs besides weights and optimizer to go on as if it had never stopped, and what it does otherwise now."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.atomic_io import write_durably
from megatron.errors import CheckpointError
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


# FORMAT: what GPT-NeoX stores as "args" and compares on load.
COMPARED_ARGS = (
    "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "make_vocab_size_divisible_by", "padded_vocab_size",
    "tokenizer_type", "model_parallel_size",
)  # fmt: skip
_MAY_DIFFER = ("max_position_embeddings", "tokenizer_type", "model_parallel_size")
_FILLING = ("padded_vocab_size", "make_vocab_size_divisible_by")


def capture_rng() -> dict[str, Any]:
    """Random states of this process under the names of the checkpoint format."""
    state: dict[str, Any] = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng_state"] = torch.cuda.get_rng_state()
    return state


def restore_rng(client_state: Mapping[str, Any], where: Path) -> None:
    """Set the random states of this process from a checkpoint.

    Raises CheckpointError when the checkpoint has none.
    """
    missing = [key for key in ("random_rng_state", "np_rng_state", "torch_rng_state") if client_state.get(key) is None]
    if missing:
        what = f"no random state in the checkpoint ({', '.join(missing)})"
        raise CheckpointError(what, where=str(where), fix="set `no_load_rng: true`, or `finetune: true`")
    version, internal, gauss = client_state["random_rng_state"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(client_state["np_rng_state"]))
    torch.set_rng_state(client_state["torch_rng_state"])
    if torch.cuda.is_available() and client_state.get("cuda_rng_state") is not None:
        torch.cuda.set_rng_state(client_state["cuda_rng_state"])


def compare_args(now: Mapping[str, Any], stored: Mapping[str, Any] | None, where: Path) -> None:
    """Refuse a checkpoint of another model; say once where a harmless value differs.

    Raises CheckpointError naming every differing key with both values.
    """
    if not stored:
        return
    different = {key: (stored[key], now[key]) for key in COMPARED_ARGS if key in stored and key in now and stored[key] != now[key]}
    filled = _FILLING if only_filling_differs(now, stored) else ()
    for key in (*_MAY_DIFFER, *filled):
        if key in different:
            before, after = different.pop(key)
            log.warning("%s was %r when the checkpoint was written and is %r now", key, before, after)
    if different:
        listed = ", ".join(f"{key}: checkpoint {before!r}, now {after!r}" for key, (before, after) in different.items())
        fix = "use the configuration it was trained with"
        raise CheckpointError(f"the checkpoint is of another model ({listed})", where=str(where), fix=fix)


def only_filling_differs(now: Mapping[str, Any], stored: Mapping[str, Any] | None) -> bool:
    """Whether one vocabulary can have been filled up to both numbers of rows, each for its own number of tensor ranks.

    >>> only_filling_differs(
    ...     {"make_vocab_size_divisible_by": 128, "model_parallel_size": 1, "padded_vocab_size": 384},
    ...     {"make_vocab_size_divisible_by": 128, "model_parallel_size": 2, "padded_vocab_size": 512},
    ... )
    True
    """
    rows, filled = [], []
    for args in (now, stored or {}):
        padded, unit, ranks = (args.get(key) for key in ("padded_vocab_size", "make_vocab_size_divisible_by", "model_parallel_size"))
        if not (isinstance(padded, int) and isinstance(unit, int) and isinstance(ranks, int)):
            return False
        rows.append(padded)
        filled.append(padded - unit * ranks)
    return rows[0] != rows[1] and max(filled) < min(rows)


def write_configs(folder: Path, config_files: Mapping[str, str]) -> None:
    """Keep the YAML files of the run, as given, in `<folder>/configs/`."""
    target = folder / "configs"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in config_files.items():
        write_durably(target / name, text)
