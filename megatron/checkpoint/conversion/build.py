# SPDX-License-Identifier: Apache-2.0
"""Configuration files -> conversions between a step's folder and other directories, with all that belongs to either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.build import compared_args, spec_for
from megatron.checkpoint.conversion.convert import convert_to_hf, convert_to_neox, rewrite_neox
from megatron.checkpoint.conversion.export import Export, Exporter, family_for, tokenizer_file
from megatron.checkpoint.conversion.logit_compare import verify
from megatron.checkpoint.conversion.model import Described, Finish, OutputLayout, Rewrite, ToHF, ToNeoX, score_fields
from megatron.checkpoint.conversion.output_folder import (
    NAME,
    TRAINING,
    add_tokenizer,
    copy_tokenizer,
    find_tokenizer,
    read_record,
    render,
    special_fields,
    tokenizer_keys,
)
from megatron.checkpoint.conversion.weights import Foreign, open_foreign
from megatron.checkpoint.formats.hf_files import read_config
from megatron.checkpoint.loading.merge_tp import read_shards, width_over
from megatron.checkpoint.loading.reshard import target_rows
from megatron.checkpoint.mapping.families import FAMILIES, TE_KEYS, canonical_keys, family_of, neox_keys
from megatron.checkpoint.steps.manifest import read_manifest
from megatron.checkpoint.steps.step_dirs import find_tag, named_step, step_of, step_tag
from megatron.errors import ConfigError
from megatron.log import get_logger
from megatron.model.build import parameter_dtype
from megatron.model.build_spec import build_spec
from megatron.model.spec import ModelSpec
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer.build import build_tokenizer

log = get_logger(__name__)

# A layout is that of the files, whatever the run's was.
ALONE: dict[str, Any] = {
    "global_num_gpus": 1,
    "pipe_parallel_size": 0,
    "model_parallel_size": 1,
    "sequence_parallel": False,
    "context_parallel_size": 1,
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "attention_over_documents": "joined",
}


def to_hf(request: ToHF) -> str:
    """Convert, and say in a line what was done."""
    step = step_folder(request.source, request.iteration)
    out = request.out.resolve()
    if request.reference is not None:
        model, record = _describe_by(step, request.reference)
        vocab_file = find_tokenizer(request, "HFTokenizer", str(request.reference / "tokenizer.json"))
    else:
        args, model = describe_step(step, request.configs)
        record = _origin(step, args)
        vocab_file = find_tokenizer(request, args.data.tokenizer_type, args.data.vocab_file)
    rows = request.vocab_size or record.get("vocab_size")
    fields = special_fields(record.get("source_config") or {}, vocab_file, request.pad_token_id)
    if model.reward:
        fields |= score_fields(request.pad_token_id, rows or model.spec.vocab_size)
    request = replace(
        request,
        source=step,
        out=out,
        preferred=known_architecture(record),
        vocab_size=rows if rows is None or request.vocab_size or rows <= model.spec.vocab_size else None,
        fields=fields,
    )
    lines: list[str] = []
    finish: list[Finish] = [
        partial(add_tokenizer, vocab_file=vocab_file, special=None if model.reward else fields),
        lambda aside: lines.extend(verify(step, aside, model, request.precision.dtype, asked=request.verify)),
    ]
    family = convert_to_hf(model, request, finish=finish)
    return "; ".join([f"wrote {out}: {family.hf}", *lines])


def to_neox(request: ToNeoX) -> str:
    """Convert, and say in a line what was done."""
    _check_layout(request)
    out = request.out.resolve()
    source = open_foreign(request.source.resolve())
    args, model, text = describe_foreign(source, out, request)
    lines: list[str] = []

    def compare(aside: Path) -> None:
        if source.cheap:
            step = aside / step_tag(request.iteration)
            lines.extend(verify(step, source.path, model, request.precision.dtype, asked=request.verify))
        else:
            lines.append("logits not compared: nothing else reads raw weights")

    def copy(aside: Path) -> None:
        copy_tokenizer(source.path, aside / "tokenizer")
        if not tokenizer_keys(source.path, out):
            log.warning("%s has no tokenizer: name one in %s (tokenizer_type, vocab_file)", source.path, out / NAME)

    finish = [copy, _configs(text, request.iteration), compare]
    step = convert_to_neox(source, model, replace(request, out=out, args=compared_args(args)), finish=finish)
    return "; ".join([f"wrote {step} ({_layout(request)}) and {out / NAME}", *lines])


def rewrite(request: Rewrite) -> str:
    """Write a checkpoint for another layout, and say in a line what was done."""
    _check_layout(request)
    out = request.out.resolve()
    step = step_folder(request.source)
    args, model = describe_step(step, request.configs, request.keys)
    layout = {"model_parallel_size": request.tensor, "pipe_parallel_size": request.pipe, "load": str(out), "finetune": True}
    given = {key: value for key, value in args.given().items() if key not in (*ALONE, *layout, "config_files")}
    text = render(f"{step}", {"Model and run": given, "Layout and weights": layout})
    args = args.replace(model_parallel_size=request.tensor, global_num_gpus=request.tensor)
    iteration = step_of(step.name) or request.iteration
    request = replace(request, source=step, out=out, iteration=iteration, args=compared_args(args))
    new = rewrite_neox(model, request, finish=[_configs(text, iteration)])
    return f"wrote {new} ({_layout(request)}) and {out / NAME}"


def step_folder(source: Path, iteration: int | None = None) -> Path:
    """The step that a folder is, or that `latest` in it names."""
    directory, step = named_step(source.resolve(), iteration)
    return directory / find_tag(directory, step)


def describe_step(step: Path, configs: Sequence[Path] = (), keys: Mapping[str, Any] | None = None) -> tuple[NeoXArgs, Described]:
    """The configuration of a checkpoint, and the model with the vocabulary that its files have."""
    files = list(configs) or sorted((step / "configs").glob("*")) or sorted((step.parent / "configs").glob("*.yml"))
    manifest = read_manifest(step)
    fixed = {**ALONE, "padded_vocab_size": width_over(read_shards(step), "word_embeddings.weight", 0)}
    if files:
        args = NeoXArgs.from_ymls([str(file) for file in files], overwrites=fixed)
    elif kept := keys or (manifest.config if manifest is not None else {}):
        args = NeoXArgs.from_dict({**kept, **fixed})
    else:
        raise ConfigError("the checkpoint holds no configuration", where=str(step / "configs"), fix="name it: --config_file FILE")
    if any(getattr(args.model, key) for key in TE_KEYS) or args.model.norm.startswith("te_"):
        args = NeoXArgs.from_dict({**canonical_keys(args.given()), **fixed})
    return args, Described(args.to_flat(), spec_for(args, step))


def describe_foreign(source: Foreign, out: Path, request: ToNeoX) -> tuple[NeoXArgs, Described, str]:
    """The configuration of a foreign model for the layout asked for, the model, and the text of its neox_config.yml."""
    keys = neox_keys(source.family, source.config)
    rows = target_rows(source.vocab_size, {"make_vocab_size_divisible_by": request.divisible_by}, request.tensor)
    keys |= {"padded_vocab_size": rows, "make_vocab_size_divisible_by": request.divisible_by}
    dtype = request.precision.dtype or next(iter(source.tensors.values())).dtype
    precision = {torch.float16: "fp16", torch.bfloat16: "bfloat16"}.get(dtype, "fp32")
    sections = {
        "Model": keys,
        "Tokenizer": tokenizer_keys(source.path, out / "tokenizer"),
        "Layout": {"model_parallel_size": request.tensor, "pipe_parallel_size": request.pipe, "precision": precision},
        "The weights: a new run begins with them": {"load": str(out), "finetune": True},
        "Training: change what you like": TRAINING,
    }
    flat = {key: value for section in sections.values() for key, value in section.items()}
    args = NeoXArgs.from_dict({**flat, "global_num_gpus": request.tensor * max(1, request.pipe)})
    return args, Described(args.to_flat(), build_spec(args)), render(f"{source.family.hf} {source.path.name}", sections)


def _describe_by(step: Path, reference: Path) -> tuple[Described, dict[str, Any]]:
    """A checkpoint's model as a Hugging Face directory describes it, and what is known of that."""
    config = read_config(reference)
    keys = {"train_iters": 1, **neox_keys(family_of(config), config)}
    keys |= {**ALONE, "padded_vocab_size": width_over(read_shards(step), "word_embeddings.weight", 0)}
    args = NeoXArgs.from_dict(keys)
    return Described(args.to_flat(), build_spec(args)), {
        "vocab_size": config["vocab_size"],
        "source_config": config,
        "architecture": family_of(config).hf,
    }


def known_architecture(record: Mapping[str, Any]) -> str | None:
    """That of the Hugging Face model a checkpoint was made of; None where it was none."""
    return next((family.name for family in FAMILIES if family.hf == record.get("architecture")), None)


def _origin(step: Path, args: NeoXArgs) -> dict[str, Any]:
    """What is known of the foreign model from which a checkpoint was made, there or where its run started."""
    loaded = args.checkpoint.load
    for folder in (step.parent, *([Path(str(loaded))] if loaded else [])):
        record = read_record(folder)
        if record.get("direction") == "hf -> neox":
            return record
    return {}


def _check_layout(request: OutputLayout) -> None:
    if request.tensor < 1 or request.pipe < 0 or request.iteration < 0:
        what = f"{request.tensor} tensor ranks, {request.pipe} stages and iteration {request.iteration} are no layout"
        raise ConfigError(what, where="command line", fix="at least 1 tensor rank, 0 stages, iteration 0")


def _layout(request: OutputLayout) -> str:
    return f"{request.tensor} tensor ranks, " + (f"{request.pipe} stages" if request.pipe else "no pipeline")


def _configs(text: str, iteration: int) -> Callable[[Path], None]:
    """Puts neox_config.yml where people look for it, and where tools do."""

    def add(aside: Path) -> None:
        (aside / NAME).write_text(text, encoding="utf-8")
        configs = aside / step_tag(iteration) / "configs"
        configs.mkdir()
        (configs / NAME).write_text(text, encoding="utf-8")

    return add


def require_exportable(args: NeoXArgs) -> None:
    """With `save_hf`: raise ConfigError, naming the keys, for a model that no Hugging Face architecture can be."""
    if args.checkpoint.save_hf is not False:
        family_for(args.to_flat(), build_spec(args))


def build_exporter(args: NeoXArgs, spec: ModelSpec, *, rank: int, started_from: Mapping[str, Any]) -> Exporter | None:
    """What writes this run's checkpoints as Hugging Face models, on the first rank; None where nothing is to be written.

    started_from: what checkpoints keep of the Hugging Face model that the run began with; empty for another beginning
    """
    section = args.checkpoint
    if section.save_hf is False or not section.save or rank != 0:
        return None
    keys = args.to_flat()
    tokenizer = build_tokenizer(args)
    # Rows that filled up the model it was made of are not given back, unless the tokenizer has grown into them.
    known = started_from.get("vocab_size")
    export = Export(
        family=family_for(keys, spec, started_from.get("architecture")),
        keys=keys,
        spec=spec,
        dtype=parameter_dtype(args),
        rows=None if known is None else min(spec.vocab_size, max(int(known), tokenizer.vocab_size)),
        fields=started_from.get("token_ids") or {"bos_token_id": None, "eos_token_id": tokenizer.eod},
        tokenizer=tokenizer_file(args.data.tokenizer_type, args.data.vocab_file),
    )
    return Exporter(Path(section.save), export, every=1 if section.save_hf is True else int(section.save_hf))
