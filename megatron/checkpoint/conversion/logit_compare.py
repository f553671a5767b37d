# SPDX-License-Identifier: Apache-2.0
"""Whether two models give the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.conversion.model import Described, head_name, is_scoring, written_family
from megatron.checkpoint.conversion.output_folder import content_of
from megatron.checkpoint.conversion.weights import Whole
from megatron.checkpoint.formats.hf_files import CONFIG, SHARD_BYTES, Planned, read_config, read_state, write_json, write_shards
from megatron.checkpoint.formats.neox_files import load_canonical
from megatron.checkpoint.formats.torch_file import LazyState, summary
from megatron.checkpoint.mapping.config_rows import FieldPair
from megatron.checkpoint.mapping.rows import Family, usual_names
from megatron.errors import CheckpointError
from megatron.log import get_logger
from megatron.model.layer_state import LayerState
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer

log = get_logger(__name__)


def chosen_layers(count: int) -> list[int]:
    """The first, the last and one between.

    >>> chosen_layers(48), chosen_layers(2)
    ([0, 24, 47], [0, 1])
    """
    return sorted({0, count // 2, count - 1})


def of_layers(model: Described, layers: Sequence[int]) -> Described:
    """The model that has these layers only."""
    spec = replace(model.spec, blocks=tuple(model.spec.blocks[layer] for layer in layers))
    return Described(model.keys, spec)


def weights_of_layers(weights: Whole, model: Described, layers: Sequence[int]) -> LazyState:
    """Its weights, under the names that they have in the smaller model."""
    total, few = model.spec.num_layers, len(layers)
    slots = {0: 0, few + 3: total + 3, few + 4: total + 4, **{number + 2: layer + 2 for number, layer in enumerate(layers)}}

    def old(name: str) -> str:
        slot, _, rest = name.partition(".")
        return f"{slots[int(slot)]}.{rest}"

    return LazyState({name: partial(weights.__getitem__, old(name)) for name in of_layers(model, layers).shapes})


def write_layers(hf: Path, target: Path, spec: ModelSpec, layers: Sequence[int]) -> None:
    """A Hugging Face directory of these layers of another one. spec: of the whole model"""
    config = read_config(hf)
    family = written_family(config)
    names = dict(_names(family, spec, layers))
    stored = usual_names(family, read_state(hf), set(names.values()))
    target.mkdir()
    write_json(target / CONFIG, _config_of_layers(config, family, spec.num_layers, layers))
    plan = [Planned(new, tuple(stored[old].shape), stored[old].dtype) for new, old in names.items()]
    tensors = ((new, stored[old]) for new, old in names.items())
    write_shards(target, plan, tensors, lambda _, tensor: content_of(tensor), limit=SHARD_BYTES)


def _names(family: Family, spec: ModelSpec, layers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(name in the smaller model, name in the larger one)"""
    for row in family.rows:
        if row.when is not None and not row.when(spec):
            continue
        for name in (row.theirs,) if isinstance(row.theirs, str) else row.theirs:
            for number, layer in enumerate(layers) if row.per_layer else [(0, 0)]:
                yield name.format(layer=number), name.format(layer=layer)


def _config_of_layers(config: Mapping[str, Any], family: Family, total: int, layers: Sequence[int]) -> dict[str, Any]:
    """Fields that list something for every layer keep the entries of these."""
    count = next(row.hf for row in family.config if isinstance(row, FieldPair) and row.neox == "num_layers")
    fields = json.loads(json.dumps(dict(config)))
    lists = {key: value for key, value in fields.items() if isinstance(value, list) and len(value) == total > 1}
    return {**fields, **{key: [value[layer] for layer in layers] for key, value in lists.items()}, count: len(layers)}


WHOLE_UP_TO = 2_000_000_000
"""Parameters of a model that is run whole; of a larger one a few layers are, unless somebody says otherwise."""
ROWS, LENGTH = 2, 64
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Of the greatest difference, relative to the greatest logit where that is above 1: float32 for weights that are the same numbers,
else for weights that may differ by the last place of their dtype."""


@dataclass(frozen=True)
class LogitDiff:
    """greatest: absolute difference of logits; largest: absolute logit; bound: what the difference may be"""

    greatest: float
    largest: float
    bound: float

    @property
    def good(self) -> bool:
        """Whether the two are the same model (a NaN is not)."""
        return self.greatest <= self.bound


def fixed_tokens(vocab: int, longest: int) -> Tensor:
    """[b, s] int64, the same ones every time."""
    return torch.randint(vocab, (ROWS, min(LENGTH, longest)), generator=torch.Generator().manual_seed(1234))


def neox_logits(weights: Whole, described: Described, tokens: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """[b, s, v] float32 by our model; the arithmetic is in float32 whatever the weights are. rounded: to that dtype first

    Of a reward model, its scores: [b, s, 1]."""
    return _run(described, weights.state(), tokens, rounded)


def _run(described: Described, state: Mapping[str, Tensor], tokens: Tensor, rounded: torch.dtype | None) -> Tensor:
    model = Transformer(described.spec, dtype=torch.float32).eval()
    name, last = head_name(described.spec), model.plan[-1]
    if described.reward and last.head is None:
        del model.sequential[str(last.number)]
    load_canonical(model, {other: state[other] for other in state if other != name} if described.reward else state)
    _round(model, rounded)
    with torch.no_grad():
        if not described.reward:
            logits: Tensor = model(tokens).full().float()
            return logits
        # What the model has after its last norm, times the head.
        stream = LayerState(tokens, torch.zeros_like(tokens, dtype=torch.int32))
        for module in model.sequential.values():
            stream = module(stream)
        return stream.hidden @ state[name].to(rounded or torch.float32).float().t()


def _round(model: nn.Module, dtype: torch.dtype | None) -> None:
    """What casting the weights to a dtype and back makes of them. Rounding what is round already changes nothing."""
    with torch.no_grad():
        for parameter in model.parameters() if dtype is not None else ():
            parameter.copy_(parameter.to(dtype))


def hf_logits(directory: Path, tokens: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """[b, s, v] float32 by transformers, or the scores of a reward model at every position. rounded: the weights are, to that dtype, first

    Raises CheckpointError where it cannot open the directory."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    scoring = is_scoring(read_config(directory))
    opener = AutoModelForSequenceClassification if scoring else AutoModelForCausalLM
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = opener.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot open the model: {error}", where=str(directory)) from error
    finally:
        logging.set_verbosity(level)
    if found["missing_keys"] or found["mismatched_keys"]:
        names = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        raise CheckpointError(f"transformers misses weights: {summary(names)}", where=str(directory))
    _round(model, rounded)
    with torch.no_grad():
        model.eval()
        logits: Tensor = model.score(model.base_model(tokens).last_hidden_state) if scoring else model(tokens).logits
    return logits.float()


def difference(ours: Tensor, theirs: Tensor, inexact: torch.dtype | None = None) -> LogitDiff:
    """Of two tensors of logits, over the vocabulary that both have.

    inexact: dtype of weights that may differ in the last place; None: both hold the same numbers
    """
    rows = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = ours[..., :rows], theirs[..., :rows]
    largest = float(ours.abs().max())
    return LogitDiff(float((ours - theirs).abs().max()), largest, BOUNDS[inexact or torch.float32] * max(1.0, largest))


def sampled_logits(
    weights: Whole, hf: Path, described: Described, tokens: Tensor, layers: Sequence[int], rounded: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Those of our model and of transformers', of these layers of each."""
    ours = _run(of_layers(described, layers), weights_of_layers(weights, described, layers), tokens, rounded)
    with TemporaryDirectory(prefix="layers-") as scratch:
        write_layers(hf, Path(scratch) / "few", described.spec, layers)
        return ours, hf_logits(Path(scratch) / "few", tokens, rounded)


def verify(step: Path, hf: Path, model: Described, rounded: torch.dtype | None, *, asked: bool | None) -> list[str]:
    """Compare the logits of a checkpoint with those of a Hugging Face directory, and say so in a line; none where it is not to be done.

    rounded: the dtype to which the weights were cast on the way; both sides are, so that nothing but the conversion is compared
    asked:   True: of the whole model; None: of a few layers of a large one; False: not at all
    Raises CheckpointError when they differ by more than arithmetic in another order explains.
    """
    if asked is False:
        return []
    weights = Whole(step, model, rounded=rounded is None)
    tokens = fixed_tokens(int(read_config(hf)["vocab_size"]), model.spec.seq_length)
    what = "scores" if model.reward else "logits"
    if asked or model.parameters <= WHOLE_UP_TO:
        ours, theirs = neox_logits(weights, model, tokens, rounded), hf_logits(hf, tokens, rounded)
    else:
        layers = chosen_layers(model.spec.num_layers)
        what, (ours, theirs) = f"{what} of a few layers", sampled_logits(weights, hf, model, tokens, layers, rounded)
    found = difference(ours, theirs, (rounded or weights.dtype) if weights.shares_round else None)
    line = f"{what} differ by at most {found.greatest:.2e} (bound {found.bound:.1e}, largest {found.largest:.1f})"
    if not found.good:
        fix = "nothing was kept; report it with the configuration of the model"
        raise CheckpointError(f"source and result are not the same model: {line}", where=str(hf), fix=fix)
    log.info("verified: %s", line)
    return [line]
