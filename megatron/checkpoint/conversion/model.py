# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked for, and the model it converts: one of logits, or a reward model with a head of one score per position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.formats.hf_files import SHARD_BYTES
from megatron.checkpoint.formats.torch_file import canonical_name, canonical_state
from megatron.checkpoint.loading.merge_tp import shardings_of
from megatron.checkpoint.mapping.config_rows import ConfigRow, Theirs
from megatron.checkpoint.mapping.families import FAMILIES, family_of
from megatron.checkpoint.mapping.rows import Family, Row
from megatron.errors import ConfigError
from megatron.model.block import unused_stored_prefixes
from megatron.model.spec import ModelSpec
from megatron.model.transformer import Transformer
from megatron.mpu.sharding import Sharding, Split

Finish = Callable[[Path], None]
"""(the folder, not yet under its name): adds files, or raises where it must not be kept."""


HEAD = "rm_linear.weight"
"""FORMAT: [1, hidden] in the last slot, split along the input; there is no final_linear, also where embeddings are not tied."""
ENDING = "ForSequenceClassification"
SCORED = ("neox", "gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Names of the families that have such a class in transformers."""


class Precision(str, Enum):
    """Of the tensors written; auto: as they are read."""

    AUTO = "auto"
    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @classmethod
    def of(cls, dtype: str | None) -> Precision:
        """Of a name like bfloat16; None: auto.

        >>> Precision.of("bfloat16").value, Precision.of(None).value
        ('bf16', 'auto')
        """
        return {None: cls.AUTO, "float16": cls.FP16, "bfloat16": cls.BF16, "float32": cls.FP32}[dtype]

    @property
    def dtype(self) -> torch.dtype | None:
        """None: each tensor keeps its own."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(self.value)


@dataclass(frozen=True)
class Described:
    """A model: our flat keys, resolved, and the specification that they give with the padded vocabulary of the files."""

    keys: Mapping[str, Any]
    spec: ModelSpec

    @property
    def reward(self) -> bool:
        """Whether it gives a score per position, not logits."""
        return self.keys.get("train_impl") == "rm"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Whole shape of each stored tensor by canonical name."""
        return self._outline[0]

    @property
    def unused(self) -> tuple[str, ...]:
        """Beginnings of names that a checkpoint may hold and the model does not read."""
        return self._outline[1]

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return sum(prod(shape) for shape in self.shapes.values())

    def shardings(self, ranks: int) -> dict[str, Sharding]:
        """How each stored tensor is spread over a number of tensor ranks."""
        table = shardings_of(self.spec, ranks) if ranks > 1 else {}
        return {**table, head_name(self.spec): Split(1)} if self.reward else table

    @cached_property
    def _outline(self) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        # Building a model costs a noticeable time even without numbers, so it is done once.
        module = Transformer(self.spec, device="meta")
        shapes = {name: tuple(tensor.shape) for name, tensor in canonical_state(module).items()}
        if self.reward:
            last = f"{self.spec.num_layers + 4}."
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(last)}
            shapes[head_name(self.spec)] = (1, self.spec.hidden_size)
        return shapes, tuple(map(canonical_name, unused_stored_prefixes(module)))


@dataclass(frozen=True, kw_only=True)
class Common:
    """Of all directions. verify: compare logits; None: those of the whole model, or of a part of a large one"""

    source: Path
    out: Path
    precision: Precision = Precision.AUTO
    overwrite: bool = False
    verify: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ToHF(Common):
    """A step's folder (or that of several) -> a Hugging Face directory; what is None is found out.

    configs:   the run's files; empty: those kept in the step's folder
    reference: a Hugging Face directory of the same model, that says everything in place of them
    architecture: name of a family; None: the first one that can express the model
    preferred: name of the family that is tried before the others
    vocab_size: rows kept of the vocabulary; None: all, those that fill it up too
    tokenizer: whether one is written; tokenizer_folder: of a Hugging Face tokenizer, in place of vocab_file
    fields:    of config.json, beyond what the family writes
    """

    configs: Sequence[Path] = ()
    reference: Path | None = None
    iteration: int | None = None
    architecture: str | None = None
    preferred: str | None = None
    vocab_size: int | None = None
    tokenizer: bool = True
    tokenizer_folder: Path | None = None
    pad_token_id: int | None = None
    shard_bytes: int = SHARD_BYTES
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OutputLayout(Common):
    """What is written is a folder of checkpoints.

    tensor:    ranks; pipe: stages, 0 = all weights in one file per tensor rank
    iteration: number of the step's folder
    dialect:   name of the family whose names the tensors get; None: ours
    args:      what the checkpoint keeps of the configuration, to be compared when it is loaded
    """

    tensor: int = 1
    pipe: int = 0
    iteration: int = 0
    dialect: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ToNeoX(OutputLayout):
    """A directory of Hugging Face's or Meta's -> a folder of checkpoints.

    divisible_by: rows of the vocabulary per tensor rank are a multiple of it
    """

    divisible_by: int = 1


@dataclass(frozen=True, kw_only=True)
class Rewrite(OutputLayout):
    """The weights of a checkpoint, in whatever dialect -> another layout. keys: of the configuration, where no file says them"""

    configs: Sequence[Path] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)


def head_name(spec: ModelSpec) -> str:
    """The head's canonical name."""
    return f"{spec.num_layers + 4}.{HEAD}"


def scoring(family: Family) -> Family:
    """A family's form with a head of one score. Raises ConfigError where transformers has none."""
    if family.name not in SCORED:
        what = f"transformers has no {_class_of(family)}"
        raise ConfigError(what, where="architecture", fix=f"a reward model can be one of: {', '.join(SCORED)}")
    head = Row(f"{{head}}.{HEAD}", "score.weight")
    rows = (*(row for row in family.rows if not row.ours.startswith("{head}.")), head)
    config = tuple(_classified(row, family) for row in family.config)
    return replace(family, hf=_class_of(family), rows=rows, config=config, tied_alias=None, renamed=())


def _class_of(family: Family) -> str:
    return family.hf.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + ENDING


def _classified(row: ConfigRow, family: Family) -> ConfigRow:
    if isinstance(row, Theirs) and row.hf == "architectures":
        return replace(row, value=[_class_of(family)], default=[_class_of(family)])
    return row


def written_family(config: Mapping[str, Any]) -> Family:
    """By the content of a config.json that was written here, a reward model's too."""
    for family in FAMILIES if is_scoring(config) else ():
        if _class_of(family) == config["architectures"][0]:
            return scoring(family)
    return family_of(config)


def is_scoring(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that gives scores."""
    names = config.get("architectures") or [""]
    return str(names[0]).endswith(ENDING)


def score_fields(pad: int | None, rows: int) -> dict[str, Any]:
    """Fields of config.json: one score, and the id after which transformers looks for the last token of a row. rows: of the vocabulary

    Raises ConfigError without such an id."""
    if pad is None or not 0 <= pad < rows:
        what = "a reward model needs the id that fills up its rows" if pad is None else f"{pad} is no id of a vocabulary of {rows}"
        raise ConfigError(what, where="--pad-token-id", fix=f"give --pad-token-id N, 0 to {rows - 1}, an id that no text ends with")
    return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad}
