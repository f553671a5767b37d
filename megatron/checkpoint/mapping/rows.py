# SPDX-License-Identifier: Apache-2.0
"""Rows of names and layouts, applied in both directions, and what several families have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megatron.checkpoint.formats.torch_file import LazyState, summary
from megatron.checkpoint.mapping.config_rows import ConfigRow, FieldPair, Fixed, Holds, Theirs
from megatron.checkpoint.mapping.ops import SAME, Op, OpContext
from megatron.errors import CheckpointError
from megatron.model.block import UNUSED_NORM
from megatron.model.spec import ModelSpec

Condition = Callable[[ModelSpec], bool]


@dataclass(frozen=True)
class Row:
    """One of our tensors and what it is on the other side.

    ours, theirs: names; `{slot}` and `{layer}` stand for a block's, `{norm}` and `{head}` for our last two slots
    when:         the row holds only for such models
    """

    ours: str
    theirs: str | tuple[str, ...]
    op: Op = SAME
    when: Condition | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one tensor per block."""
        return "{slot}" in self.ours


@dataclass(frozen=True)
class Bound:
    """A row for one layer of one model."""

    ours: str
    theirs: tuple[str, ...]
    op: Op
    place: OpContext


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that is special about one foreign architecture.

    name:       short name, as in `--architecture`
    hf:         class name in transformers; model_type: its config's
    rows:       of tensors; config: of configuration fields
    ignored:    patterns of foreign names that carry no weights
    prefix:     of foreign names; files saved from the bare base model lack it
    tied_alias: foreign name that repeats the embedding when embeddings are tied
    renamed:    (other, name): a name that other versions of transformers give to a tensor of ours
    same:       patterns of names that no row speaks of and that are alike on both sides
    """

    name: str
    hf: str
    model_type: str
    rows: tuple[Row, ...]
    config: tuple[ConfigRow, ...]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    tied_alias: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    same: tuple[str, ...] = ()


def with_bias(ours: str, theirs: str | tuple[str, ...], op: Op = SAME, *, when: Condition | None = None) -> tuple[Row, Row]:
    """The rows of a layer's weight and bias. ours, theirs: names up to the parameter's; when: the layer has a bias"""
    stems = (theirs,) if isinstance(theirs, str) else theirs
    weight, bias = (tuple(f"{stem}{end}" for stem in stems) for end in ("weight", "bias"))
    return Row(f"{ours}.weight", weight, op), Row(f"{ours}.bias", bias, op, when)


def bound_rows(family: Family, spec: ModelSpec, vocab_size: int) -> Iterator[Bound]:
    """Every row for every layer it stands for, in order of our slots."""
    count = spec.num_layers
    fixed = {"norm": count + 3, "head": count + 4}
    for row in family.rows:
        if row.when is not None and not row.when(spec):
            continue
        theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
        for layer in range(count) if row.per_layer else (0,):
            names = {**fixed, "layer": layer, "slot": layer + 2}
            place = OpContext(spec=spec, layer=layer, vocab_size=vocab_size)
            yield Bound(row.ours.format(**names), tuple(name.format(**names) for name in theirs), row.op, place)


def to_canonical(family: Family, source: Mapping[str, Tensor], spec: ModelSpec) -> LazyState:
    """The other side's tensors under our names, made one at a time on access.

    Raises CheckpointError, before any tensor is read, when a name is missing or nobody claims it.
    """
    rows = list(bound_rows(family, spec, spec.vocab_size))
    wanted = {name for row in rows for name in row.theirs}
    source = usual_names(family, source, wanted)
    alike = [name for name in source if name not in wanted and matches(name, family.same)]
    taken = wanted.union(alike)
    surplus = [name for name in source if name not in taken and not matches(name, family.ignored)]
    if spec.tied and family.tied_alias in surplus:
        surplus.remove(family.tied_alias)
    check_names(family.hf, missing=sorted(wanted - set(source)), surplus=sorted(surplus))
    makers = {name: partial(source.__getitem__, name) for name in alike}
    return LazyState({**makers, **{row.ours: partial(packed, row, source) for row in rows}})


def from_canonical(family: Family, state: Mapping[str, Tensor], spec: ModelSpec, *, vocab_size: int | None = None) -> LazyState:
    """Our tensors under the other side's names, made one at a time on access.

    vocab_size: rows to keep of the vocabulary matrices; None = all, the padded ones too
    Raises CheckpointError, before any tensor is read, when a name is missing or nobody claims it.
    """
    rows = list(bound_rows(family, spec, spec.vocab_size if vocab_size is None else vocab_size))
    ours = {row.ours for row in rows}
    alike = [name for name in state if name not in ours and matches(name, family.same)]
    taken = ours.union(alike)
    idle = tuple(f"{slot}.{UNUSED_NORM[block.residual]}." for slot, block in enumerate(spec.blocks, 2) if block.residual in UNUSED_NORM)
    surplus = [name for name in state if name not in taken and not name.startswith(idle) and not name.endswith("rotary_emb.inv_freq")]
    check_names("the model", missing=sorted(ours - set(state)), surplus=sorted(surplus))
    makers = {name: partial(state.__getitem__, name) for name in alike}
    return LazyState({**makers, **{name: partial(unpacked, row, index, state) for row in rows for index, name in enumerate(row.theirs)}})


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def packed(row: Bound, source: Mapping[str, Tensor]) -> Tensor:
    """Our tensor of a row."""
    (whole,) = row.op.pack([source[name] for name in row.theirs], row.place)
    return whole


def unpacked(row: Bound, index: int, state: Mapping[str, Tensor]) -> Tensor:
    """The other side's tensor number `index` of a row."""
    return row.op.unpack([state[row.ours]], row.place)[index]


def usual_names(family: Family, source: Mapping[str, Tensor], wanted: set[str]) -> Mapping[str, Tensor]:
    """The source under the names its rows use, where it was saved from the bare base model or by another version."""
    others = {other: name for other, name in family.renamed if name not in source}
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in source)

    def usual(name: str) -> str:
        if bare and family.prefix + name in wanted:
            return family.prefix + name
        return others.get(name, name)

    names = {usual(name): name for name in source}
    return LazyState({new: partial(source.__getitem__, old) for new, old in names.items()})


def check_names(where: str, *, missing: list[str], surplus: list[str]) -> None:
    """Raise CheckpointError unless both lists are empty."""
    if missing or surplus:
        what = f"tensor names do not fit: missing {summary(missing)}; claimed by no row {summary(surplus)}"
        raise CheckpointError(what, where=where, fix="check that the configuration describes this checkpoint")


# No family here can express these keys.
COMMON: tuple[ConfigRow, ...] = (
    Fixed("opt_pos_emb_offset", 0, 0),
    Fixed("use_mup", False, False),
    Fixed("mup_rp_embedding_mult", 1.0, 1.0),
    Fixed("moe_num_experts", 1, 1),
    Theirs("quantization_config", None, None),
)


def sizes(hidden: str, layers: str, heads: str, *more: ConfigRow) -> tuple[ConfigRow, ...]:
    """Rows of the sizes that every model has. more: rows that stand before that of the vocabulary"""
    named = {"hidden_size": hidden, "num_layers": layers, "num_attention_heads": heads}
    return (*(FieldPair(ours, theirs) for ours, theirs in named.items()), *more, FieldPair("padded_vocab_size", "vocab_size"))


def rms_norms(epsilon: str, default: float) -> tuple[ConfigRow, ...]:
    """Rows of a model with RMSNorms. epsilon: their field, whose absence means the default"""
    row = FieldPair("rms_norm_epsilon", epsilon, default, 1e-8)
    return Fixed("norm", "rmsnorm", "layernorm"), row, Fixed("use_bias_in_norms", False, True)


# Norms before the sublayers, none on queries and keys.
PLAIN_NORMS: tuple[ConfigRow, ...] = (Fixed("norm_placement", "pre", "pre"), Fixed("use_qk_layernorm", False, False))

# All projections of attention have biases, or none has.
ONE_ATTENTION_BIAS = Holds(
    "use_bias_in_attn_output",
    lambda spec: spec.blocks[0].attention.output_bias == spec.blocks[0].attention.bias,
    "leave it out, so that it is as use_bias_in_attn_linear",
)

NO_WINDOWS: tuple[ConfigRow, ...] = (Fixed("sliding_window_width", None, None), Fixed("sliding_window_pattern", None, None))


def untied(spec: ModelSpec) -> bool:
    """Whether the head has a matrix of its own."""
    return not spec.tied


def attention_bias(spec: ModelSpec) -> bool:
    """Whether the attention projections have biases."""
    return spec.blocks[0].attention.bias


def output_bias(spec: ModelSpec) -> bool:
    """Whether the output projection of attention has a bias."""
    return spec.blocks[0].attention.output_bias


def mlp_bias(spec: ModelSpec) -> bool:
    """Whether the MLP projections have biases."""
    return spec.blocks[0].mlp.bias
