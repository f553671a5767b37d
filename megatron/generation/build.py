# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> a model with a checkpoint's weights, its tokenizer, and the generation mode asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch

from megatron.checkpoint.build import Weights, hf_shapes, hf_spec, search_of, spec_for
from megatron.checkpoint.loading.hf_view import ROWS, HFModel, fetch, is_hf
from megatron.checkpoint.loading.merge_tp import read_shards, shard_for, width_over
from megatron.checkpoint.steps.discovery import find
from megatron.engine.build import build_model, join_job
from megatron.engine.distributed import choose_device, stop
from megatron.errors import ConfigError
from megatron.generation.decode import DecodeSettings, ModelScorer, Sampling
from megatron.generation.modes import TextGenType, Writer, input_file, interactive, unconditional
from megatron.launch.signals import noting_signals
from megatron.log import get_logger
from megatron.model.transformer import Transformer
from megatron.mpu.groups import Group, Groups
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


@contextmanager
def joined(args: NeoXArgs) -> Iterator[tuple[Groups, torch.device]]:
    """Within, this process is a rank of the job that a launcher started, or alone where none did."""
    if "WORLD_SIZE" not in os.environ:
        yield Groups.single(), choose_device(0)
        return
    failed = True
    try:
        yield join_job(args)
        failed = False
    finally:
        stop(failed=failed)


def whole_rows(groups: Groups) -> Groups:
    """The same ranks, each with whole sequences: context ranks work alike, tensor ranks do not cut activations.

    A weight is not cut along either, and decoding goes on by one token at a time, which cannot be cut.
    """
    return replace(groups, cp=Group.single(), tp=replace(groups.tp, sequence=False))


def load_model(args: NeoXArgs, groups: Groups | None = None, device: torch.device | None = None) -> Loaded:
    """The frozen model with the weights of `load` (at `iteration`, else the newest whole ones), at the layout of `groups`.

    Each rank reads and holds its own part only. The checkpoint may have been written at any pipeline and tensor parallel size, or be a
    Hugging Face model (`load: hf:...`); it also settles the padded vocabulary where `padded_vocab_size` is not given.
    Raises ConfigError without `load`, CheckpointError when it does not fit.
    """
    if not args.checkpoint.load:
        raise ConfigError("no checkpoint is named", where="load", fix="load: <the folder a training run saved to>")
    groups = groups or Groups.single()
    if is_hf(args.checkpoint.load):
        folder = fetch(args.checkpoint.load, groups.world, contents=False).directory
        hf = HFModel.open(folder)
        if args.model.padded_vocab_size is None:
            args = args.replace(padded_vocab_size=hf.keys[ROWS])
        spec = hf_spec(args, hf)
        weights = Weights(shard_for([hf.weights(spec)], spec, groups.tp), hf_shapes(hf, spec, groups.tp))
    else:
        search = search_of(args)
        folder = search.directory / find(search, groups.world)
        shards = read_shards(folder)
        if args.model.padded_vocab_size is None:
            args = args.replace(padded_vocab_size=width_over(shards, "word_embeddings.weight", 0))
        spec = spec_for(args, folder)
        weights = Weights(shard_for(shards, spec, groups.tp))
    model = build_model(args, spec, weights, groups, device or choose_device(0), place=folder)
    assert isinstance(model, Transformer)
    log.info("loaded %s", folder)
    return Loaded(args, model, folder)


def build_writer(args: NeoXArgs, groups: Groups | None = None, device: torch.device | None = None) -> Writer:
    """Model, tokenizer and the sampling keys as a Writer."""
    groups = groups or Groups.single()
    tokenizer = build_tokenizer(args)
    loaded = load_model(args, whole_rows(groups), device)
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
    return Writer(scorer, tokenizer, settings, args.run.seed, world=groups.world)


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
    Under a launcher all ranks work, each with its part of the model, and the first one reads and writes.
    """
    mode = mode_of(args)
    text = args.text
    output = Path(text.sample_output_file) if text.sample_output_file else None
    with joined(args) as (groups, device):
        if mode is TextGenType.INTERACTIVE:
            interactive(build_writer(args, groups, device), text.prompt_end, source, screen)
            return None
        with noting_signals() as received:
            writer = replace(build_writer(args, groups, device), received=received)
            if mode is TextGenType.INPUT_FILE:
                output = input_file(writer, Path(text.sample_input_file or ""), text.prompt_end, output)
            else:
                output = output or Path("samples.txt")
                unconditional(writer, text.num_samples, output)
            return output if groups.world.rank == 0 else None
