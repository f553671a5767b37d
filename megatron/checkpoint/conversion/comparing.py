# SPDX-License-Identifier: Apache-2.0
"""Logits of a checkpoint and of a Hugging Face directory on fixed tokens, ours by our model, theirs by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from megatron.checkpoint.conversion.model import Described
from megatron.checkpoint.conversion.sampling import chosen_layers, of_layers, weights_of_layers, write_layers
from megatron.checkpoint.conversion.weights import Whole
from megatron.checkpoint.hf_store import read_config
from megatron.checkpoint.state import load_canonical, summary
from megatron.errors import CheckpointError
from megatron.log import get_logger
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer

log = get_logger(__name__)

WHOLE_UP_TO = 2_000_000_000
"""Parameters of a model that is run whole; of a larger one a few layers are, unless somebody says otherwise."""
ROWS, LENGTH = 2, 64
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the greatest difference, relative to the greatest logit where that is above 1; for weights that were rounded."""


@dataclass(frozen=True)
class Difference:
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


def neox_logits(step: Path, described: Described, tokens: Tensor) -> Tensor:
    """[b, s, v] float32 by our model; the arithmetic is in float32 whatever the weights are."""
    return _run(described.spec, Whole(step, described).state(), tokens)


def _run(spec: ModelSpec, state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    model = Transformer(spec, dtype=torch.float32).eval()
    load_canonical(model, state)
    with torch.no_grad():
        logits: Tensor = model(tokens).full().float()
    return logits


def hf_logits(directory: Path, tokens: Tensor) -> Tensor:
    """[b, s, v] float32 by transformers. Raises CheckpointError where it cannot open the directory."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory, torch_dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot open the model: {error}", where=str(directory)) from error
    finally:
        logging.set_verbosity(level)
    if found["missing_keys"] or found["mismatched_keys"]:
        names = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        raise CheckpointError(f"transformers misses weights: {summary(names)}", where=str(directory))
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens).logits.float()
    return logits


def difference(ours: Tensor, theirs: Tensor, rounded: torch.dtype | None) -> Difference:
    """Of two tensors of logits, over the vocabulary that both have.

    rounded: the dtype to which the weights were cast on the way; None: both hold the same numbers
    """
    rows = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = ours[..., :rows], theirs[..., :rows]
    largest = float(ours.abs().max())
    return Difference(float((ours - theirs).abs().max()), largest, BOUNDS[rounded or torch.float32] * max(1.0, largest))


def sampled_logits(step: Path, hf: Path, described: Described, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Those of our model and of transformers', of these layers of each."""
    small = of_layers(described, layers)
    ours = _run(small.spec, weights_of_layers(Whole(step, described), described, layers), tokens)
    with TemporaryDirectory(prefix="layers-") as scratch:
        write_layers(hf, Path(scratch) / "few", described.spec, layers)
        return ours, hf_logits(Path(scratch) / "few", tokens)


def verify(step: Path, hf: Path, model: Described, rounded: torch.dtype | None, *, asked: bool | None) -> list[str]:
    """Compare the logits of a checkpoint with those of a Hugging Face directory, and say so in a line; none where it is not to be done.

    asked: True: of the whole model; None: of a few layers of a large one; False: not at all
    Raises CheckpointError when they differ by more than the precision explains.
    """
    if asked is False:
        return []
    tokens = fixed_tokens(int(read_config(hf)["vocab_size"]), model.spec.seq_length)
    if asked or model.parameters <= WHOLE_UP_TO:
        what, ours, theirs = "logits", neox_logits(step, model, tokens), hf_logits(hf, tokens)
    else:
        what, (ours, theirs) = "logits of a few layers", sampled_logits(step, hf, model, tokens, chosen_layers(model.spec.num_layers))
    found = difference(ours, theirs, rounded)
    line = f"{what} differ by at most {found.greatest:.2e} (bound {found.bound:.1e}, largest logit {found.largest:.1f})"
    if not found.good:
        mend = "nothing was kept; report it with the configuration of the model"
        raise CheckpointError(f"source and result are not the same model: {line}", where=str(hf), mend=mend)
    log.info("verified: %s", line)
    return [line]
