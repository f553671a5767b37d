# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> muP's coordinate check of the configured model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron.engine.distributed import choose_device
from megatron.errors import ConfigError, required
from megatron.evaluation.coordinates import Size, Subject, measure
from megatron.model.build import build_transformer
from megatron.neox_arguments import NeoXArgs
from megatron.optim.build import build_optimizer
from megatron.optim.groups import rate_of

# A coordinate check's batch: rows, tokens of a row at most, and the vocabulary where the configuration does not say it.
CHECK_ROWS, CHECK_TOKENS, CHECK_VOCAB = 8, 128, 1024


def coordinate_check(args: NeoXArgs, widths: Sequence[int], *, steps: int) -> list[Size]:
    """Sizes of the configured model's activations at several values of hidden_size, over `steps` updates on one batch of random tokens.

    The number of heads stays and the heads grow; a given intermediate_size grows in proportion. Weights are float32, the learning rate
    stays at `lr`. Raises ConfigError for a width that the model cannot have.
    """
    if len(set(widths)) < 2 or steps < 1:
        fix = "e.g. --widths 64,128,256 --steps 3"
        raise ConfigError("a coordinate check needs two different widths and one step at least", where="--widths, --steps", fix=fix)
    device = choose_device(0)
    seq_length = min(required(args.model.seq_length, "seq_length"), CHECK_TOKENS)
    vocab = args.model.padded_vocab_size or CHECK_VOCAB
    tokens = torch.randint(vocab, (CHECK_ROWS, seq_length + 1), generator=torch.Generator().manual_seed(args.run.seed)).to(device)

    def make(width: int) -> Subject:
        changed = at_width(args, width).replace(padded_vocab_size=vocab)
        model = build_transformer(changed).to(device)
        optimizer = build_optimizer(changed, model, device)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(group, required(changed.optim.lr, "lr"))
        return Subject(model=model, optimizer=optimizer, max_norm=changed.optim.gradient_clipping)

    return measure(make, sorted(set(widths)), tokens, steps)


def at_width(args: NeoXArgs, width: int) -> NeoXArgs:
    """The configuration with another hidden_size, for one process in float32."""
    inner = args.model.intermediate_size
    wide = None if inner is None else inner * width // required(args.model.hidden_size, "hidden_size")
    plain = {"precision": "fp32", "fp16": None, "bf16": None, "zero_optimization": {"stage": 0}, "torch_compile": False}
    return args.replace(hidden_size=width, intermediate_size=wide, coord_check=False, **plain)
