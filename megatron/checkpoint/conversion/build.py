# SPDX-License-Identifier: Apache-2.0
"""Configuration files -> conversions between a step's folder and a Hugging Face directory, with all that belongs to either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.build import compared_args, spec_for
from megatron.checkpoint.conversion.companions import copy_tokenizer, save_tokenizer, special_ids, tokenizer_keys, write_generation_config
from megatron.checkpoint.conversion.comparing import difference, fixed_tokens, hf_logits, neox_logits
from megatron.checkpoint.conversion.config_file import NAME, TRAINING, render
from megatron.checkpoint.conversion.model import Described, HFChoice, NeoXChoice, Precision
from megatron.checkpoint.conversion.table import read_record
from megatron.checkpoint.conversion.to_hf import Finish, convert_to_hf
from megatron.checkpoint.conversion.to_neox import convert_to_neox
from megatron.checkpoint.convert import neox_keys
from megatron.checkpoint.families.registry import family_of
from megatron.checkpoint.hf_store import read_config, read_state
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.neox_store import find_tag, named_step
from megatron.checkpoint.resharding import target_rows
from megatron.checkpoint.steps import step_tag
from megatron.checkpoint.whole import read_shards, width_over
from megatron.errors import CheckpointError, ConfigError
from megatron.log import get_logger
from megatron.model.build import build_spec
from megatron.model.spec import ModelSpec
from megatron.neox_arguments import NeoXArgs

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

VERIFIED_UP_TO = 2_000_000_000
"""Parameters of a model whose logits are compared unless somebody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Of both directions. verify: compare logits; None: where the model is not too large"""

    precision: Precision = Precision.AUTO
    overwrite: bool = False
    verify: bool | None = None
    tokenizer: bool = True


@dataclass(frozen=True, kw_only=True)
class ToHF(Common):
    """A step's folder (or that of several) -> a Hugging Face directory; what is None is found out.

    configs:   the run's files; empty: those kept in the step's folder
    tokenizer_folder: a Hugging Face tokenizer's, in place of vocab_file
    """

    source: Path
    out: Path
    configs: Sequence[Path] = ()
    architecture: str | None = None
    vocab_size: int | None = None
    iteration: int | None = None
    tokenizer_folder: Path | None = None
    pad_token_id: int | None = None
    max_shard_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ToNeoX(Common):
    """A Hugging Face directory -> a folder of checkpoints. divisible_by: rows of the vocabulary per tensor rank are a multiple of it"""

    source: Path
    out: Path
    tensor: int = 1
    pipe: int = 0
    iteration: int = 0
    divisible_by: int = 1
    keys: dict[str, Any] = field(default_factory=dict)


def to_hf(request: ToHF) -> str:
    """Convert, and say in a line what was done."""
    directory, iteration = named_step(request.source.resolve(), request.iteration)
    step = directory / find_tag(directory, iteration)
    out = request.out.resolve()
    args, model = describe_step(step, request.configs)
    record = _origin(step, args)
    rows = request.vocab_size or _rows_of(record, model.spec)
    vocab_file = tokenizer_file(args, request)
    fields = _special_fields(request, record, vocab_file)
    choice = HFChoice(
        architecture=request.architecture,
        precision=request.precision,
        vocab_size=rows,
        overwrite=request.overwrite,
        fields=fields,
        **({} if request.max_shard_bytes is None else {"shard_bytes": request.max_shard_bytes}),
    )
    finish: list[Finish] = []
    if vocab_file is not None:
        finish.append(lambda aside: save_tokenizer(vocab_file, aside))
    finish.append(lambda aside: write_generation_config(aside, fields))
    lines: list[str] = []
    if _verifies(request, model):
        finish.append(lambda aside: lines.append(verify(step, aside, model, request.precision.dtype)))
    family = convert_to_hf(step, out, model, choice, finish=finish)
    return "; ".join([f"wrote {out}: {family.hf}", *lines])


def to_neox(request: ToNeoX) -> str:
    """Convert, and say in a line what was done."""
    source, out = request.source.resolve(), request.out.resolve()
    if request.tensor < 1 or request.pipe < 0 or request.iteration < 0:
        what = f"{request.tensor} tensor ranks, {request.pipe} stages and iteration {request.iteration} are no layout"
        raise ConfigError(what, where="command line", mend="--tp >= 1, --pp >= 0, --iteration >= 0")
    args, model, text = describe_hf(source, out, request)
    choice = NeoXChoice(
        tensor=request.tensor,
        pipe=request.pipe,
        iteration=request.iteration,
        precision=request.precision,
        overwrite=request.overwrite,
        args=compared_args(args),
    )

    def add_files(aside: Path) -> None:
        copy_tokenizer(source, aside / "tokenizer")
        (aside / NAME).write_text(text, encoding="utf-8")
        configs = aside / step_tag(request.iteration) / "configs"
        configs.mkdir()
        (configs / NAME).write_text(text, encoding="utf-8")

    finish: list[Finish] = [add_files]
    lines: list[str] = []
    if _verifies(request, model):
        tag = step_tag(request.iteration)
        finish.append(lambda aside: lines.append(verify(aside / tag, source, model, request.precision.dtype)))
    step = convert_to_neox(source, out, model, choice, finish=finish)
    layout = f"{request.tensor} tensor ranks, " + (f"{request.pipe} stages" if request.pipe else "no pipeline")
    return "; ".join([f"wrote {step} ({layout}) and {out / NAME}", *lines])


def describe_step(step: Path, configs: Sequence[Path] = ()) -> tuple[NeoXArgs, Described]:
    """The configuration of a checkpoint, and the model with the vocabulary that its files have."""
    files = list(configs) or sorted((step / "configs").glob("*"))
    manifest = read_manifest(step)
    rows = width_over(read_shards(step), "word_embeddings.weight", 0)
    fixed = {**ALONE, "padded_vocab_size": rows}
    if files:
        args = NeoXArgs.from_ymls([str(file) for file in files], overwrites=fixed)
    elif manifest is not None and manifest.config:
        args = NeoXArgs.from_dict({**manifest.config, **fixed})
    else:
        raise ConfigError("the checkpoint holds no configuration", where=str(step / "configs"), mend="name it: --config_file FILE")
    return args, Described(args.to_flat(), spec_for(args, step))


def describe_hf(hf: Path, out: Path, request: ToNeoX) -> tuple[NeoXArgs, Described, str]:
    """The configuration of a Hugging Face model for the layout asked for, the model, and the text of its neox_config.yml."""
    config = read_config(hf)
    family = family_of(config)
    keys = neox_keys(family, config)
    rows = target_rows(int(config["vocab_size"]), {"make_vocab_size_divisible_by": request.divisible_by}, request.tensor)
    keys |= {"padded_vocab_size": rows, "make_vocab_size_divisible_by": request.divisible_by}
    dtype = request.precision.dtype or _bulk_dtype(hf)
    precision = {torch.float16: "fp16", torch.bfloat16: "bfloat16"}.get(dtype, "fp32")
    layout = {"model_parallel_size": request.tensor, "pipe_parallel_size": request.pipe, "precision": precision}
    sections = {
        "Model": {**keys, **request.keys},
        "Tokenizer": tokenizer_keys(hf, out / "tokenizer"),
        "Layout": layout,
        "The weights: a new run begins with them": {"load": str(out), "finetune": True},
        "Training: change what you like": TRAINING,
    }
    flat = {key: value for section in sections.values() for key, value in section.items()}
    args = NeoXArgs.from_dict({**flat, "global_num_gpus": request.tensor * max(1, request.pipe)})
    return args, Described(args.to_flat(), build_spec(args)), render(f"{family.hf} {hf.name}", sections)


def verify(step: Path, hf: Path, model: Described, rounded: torch.dtype | None) -> str:
    """Compare the logits of a checkpoint with those of a Hugging Face directory. Raises CheckpointError when they differ."""
    tokens = fixed_tokens(int(read_config(hf)["vocab_size"]), model.spec.seq_length)
    found = difference(neox_logits(step, model, tokens), hf_logits(hf, tokens), rounded)
    line = f"logits differ by at most {found.greatest:.2e} (bound {found.bound:.1e}, largest logit {found.largest:.1f})"
    if not found.good:
        raise CheckpointError(
            f"source and result are not the same model: {line}", where=str(hf), mend="nothing was kept; report it with the model's config"
        )
    log.info("verified: %s", line)
    return line


def tokenizer_file(args: NeoXArgs, request: ToHF) -> Path | None:
    """The tokenizer.json to be written beside the weights; None, with a warning, where there is none to be found."""
    if not request.tokenizer:
        return None
    if request.tokenizer_folder is not None:
        found = request.tokenizer_folder / "tokenizer.json"
        if not found.is_file():
            raise ConfigError("no tokenizer.json is there", where=str(request.tokenizer_folder), mend="name a tokenizer's folder")
        return found
    if args.data.tokenizer_type != "HFTokenizer" or not args.data.vocab_file:
        log.warning("tokenizer_type is %s: no tokenizer is written", args.data.tokenizer_type)
        return None
    given = Path(args.data.vocab_file)
    for place in (given, *(config.parent / given for config in request.configs)):
        if place.is_dir() and (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
        if place.is_file():
            return place
    log.warning("vocab_file %s is not there: no tokenizer is written", given)
    return None


def _verifies(request: Common, model: Described) -> bool:
    if request.verify is not None:
        return request.verify
    count = model.parameters
    if count > VERIFIED_UP_TO:
        log.info("%.1f billion parameters: logits are not compared (--verify does)", count / 1e9)
    return count <= VERIFIED_UP_TO


def _origin(step: Path, args: NeoXArgs) -> dict[str, Any]:
    """What is known of the Hugging Face model from which a checkpoint was made, there or where its run started."""
    loaded = args.checkpoint.load
    for folder in (step.parent, *([Path(str(loaded))] if loaded else [])):
        record = read_record(folder)
        if record.get("direction") == "hf -> neox":
            return record
    return {}


def _rows_of(record: dict[str, Any], spec: ModelSpec) -> int | None:
    rows = record.get("vocab_size")
    return rows if isinstance(rows, int) and rows <= spec.vocab_size else None


def _special_fields(request: ToHF, record: dict[str, Any], vocab_file: Path | None) -> dict[str, Any]:
    """Ids of special tokens: those of the model it was made of, else the tokenizer's; never the defaults of transformers."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    source = record.get("source_config") or {}
    fields: dict[str, Any] = {name: source[name] for name in ids if name in source}
    if not fields:
        fields = {"bos_token_id": None, "eos_token_id": None, **({} if vocab_file is None else special_ids(vocab_file.parent))}
    return fields if request.pad_token_id is None else {**fields, "pad_token_id": request.pad_token_id}


def _bulk_dtype(hf: Path) -> torch.dtype:
    """The dtype of most numbers."""
    counts: dict[torch.dtype, int] = {}
    for tensor in read_state(hf).values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype])
