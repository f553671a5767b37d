# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> a model with a checkpoint's weights, its tokenizer, and the generation mode asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from megatron.checkpoint.build import hf_shapes, hf_spec, search_of
from megatron.checkpoint.formats.neox_files import copy_weights
from megatron.checkpoint.loading.hf_view import ROWS, HFModel
from megatron.checkpoint.loading.merge_tp import join_shards, read_shards, width_over
from megatron.checkpoint.remote.hub_resolve import fetch, is_hf
from megatron.checkpoint.steps.discovery import find
from megatron.errors import ConfigError
from megatron.generation.decode import DecodeSettings, ModelScorer
from megatron.generation.modes import TextGenType, Writer, input_file, interactive, unconditional
from megatron.generation.sampling import Sampling
from megatron.launch.signals import noting_signals
from megatron.log import get_logger
from megatron.model.build import build_spec, build_transformer
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.unfinished import refuse_value
from megatron.tokenizer.build import build_tokenizer

log = get_logger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model ready to read tokens. args: with `padded_vocab_size` filled in; folder: where the weights came from"""

    args: NeoXArgs
    model: Transformer
    folder: Path


def load_model(args: NeoXArgs) -> Loaded:
    """The whole model in this process, in evaluation mode, with the weights of `load` (at `iteration`, else the newest whole ones).

    The checkpoint may have been written at any pipeline and tensor parallel size, or be a Hugging Face model (`load: hf:...`); it also
    settles the padded vocabulary where `padded_vocab_size` is not given.
    Raises ConfigError without `load`, CheckpointError when it does not fit.
    """
    if not args.checkpoint.load:
        raise ConfigError("no checkpoint is named", where="load", fix="load: <the folder a training run saved to>")
    weights: Mapping[str, Tensor]
    shapes = None
    if is_hf(args.checkpoint.load):
        folder = fetch(args.checkpoint.load, contents=False).directory
        hf = HFModel.open(folder)
        if args.model.padded_vocab_size is None:
            args = args.replace(padded_vocab_size=hf.keys[ROWS])
        spec = hf_spec(args, hf)
        weights, shapes = hf.weights(spec), hf_shapes(hf, spec, Group.single())
    else:
        search = search_of(args)
        folder = search.directory / find(search)
        shards = read_shards(folder)
        if args.model.padded_vocab_size is None:
            args = args.replace(padded_vocab_size=width_over(shards, "word_embeddings.weight", 0))
        spec = fitting_spec(args, width_over(shards, "mlp.linear2.weight", 1))
        weights = join_shards(shards, spec)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    model = build_transformer(args, spec, device=device)
    copy_weights(weights, model, folder, shapes=shapes)
    log.info("loaded %s", folder)
    return Loaded(args, model.eval(), folder)


def fitting_spec(args: NeoXArgs, mlp_width: int | None) -> ModelSpec:
    """The model's specification, in the sense of `intermediate_size` that gives the width found in the checkpoint."""
    spec = build_spec(args)
    for convention in ("literal", "two_thirds"):
        if mlp_width is None or spec.blocks[0].mlp.width == mlp_width:
            break
        other = build_spec(args, mlp_convention=convention)
        spec = other if other.blocks[0].mlp.width == mlp_width else spec
    return spec


def build_writer(args: NeoXArgs) -> Writer:
    """Model, tokenizer and the sampling keys as a Writer."""
    tokenizer = build_tokenizer(args)
    loaded = load_model(args)
    rows = loaded.model.spec.vocab_size
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the checkpoint only {rows} rows for them",
            where="vocab_file",
            fix="use the tokenizer the model was trained with",
        )
    text = args.text
    settings = DecodeSettings(
        sampling=Sampling(temperature=text.temperature, top_k=text.top_k, top_p=text.top_p),
        maximum_tokens=text.maximum_tokens,
        eod=tokenizer.eod,
        recompute=text.recompute,
        keep_logits=text.return_logits,
    )
    scorer = ModelScorer(loaded.model, longest=loaded.model.spec.seq_length, vocab_size=tokenizer.vocab_size)
    return Writer(scorer, tokenizer, settings, args.run.seed)


def mode_of(args: NeoXArgs) -> TextGenType:
    """`text_gen_type`, or what follows from `sample_input_file` when it is not given."""
    given = args.text.text_gen_type
    if given is None:
        return TextGenType.INPUT_FILE if args.text.sample_input_file else TextGenType.UNCONDITIONAL
    refuse_value("text_gen_type", given)
    return TextGenType(given)


def generate(args: NeoXArgs, source: TextIO, screen: TextIO) -> Path | None:
    """Run the mode that `args` asks for; returns the file written, None for interactive.

    Raises StoppedError when a signal came; then the texts finished by then are written.
    Under a launcher only the first rank works, on the whole model: every rank would write the same.
    """
    mode = mode_of(args)
    if int(os.environ.get("RANK", "0")) > 0:
        return None
    text = args.text
    output = Path(text.sample_output_file) if text.sample_output_file else None
    if mode is TextGenType.INTERACTIVE:
        interactive(build_writer(args), text.prompt_end, source, screen)
        return None
    with noting_signals() as received:
        writer = replace(build_writer(args), received=received)
        if mode is TextGenType.INPUT_FILE:
            return input_file(writer, Path(text.sample_input_file or ""), text.prompt_end, output)
        output = output or Path("samples.txt")
        unconditional(writer, text.num_samples, output)
        return output
