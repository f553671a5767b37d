# SPDX-License-Identifier: Apache-2.0
"""All families of models, and a configuration of either side as the other's.

Beside those of Hugging Face there are dialects: names that other versions of NeoX gave to our tensors, older ones and those of
TransformerEngine's layers. A dialect has a form of attention, one of the MLP and one of the norms. It is spoken rank by rank, so its
rows apply to the tensors of one tensor rank, with the spec of that rank (`of_rank`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from torch import Tensor

from megatron.checkpoint.mapping.config_rows import Config, ConfigRow
from megatron.checkpoint.mapping.decoders import GPT2, GPT_NEOX, LLAMA, MISTRAL, OLMO2, OLMO3, QWEN2, QWEN3
from megatron.checkpoint.mapping.meta_llama import META_LLAMA
from megatron.checkpoint.mapping.ops import Concat, GateFirst, GroupQKV
from megatron.checkpoint.mapping.rows import Family, Row, attention_bias, mlp_bias, output_bias, to_canonical, with_bias
from megatron.errors import ConfigError
from megatron.model.spec import BlockSpec, ModelSpec, NormKind, Residual
from megatron.mpu.sharding import local_size

FAMILIES: tuple[Family, ...] = (GPT_NEOX, GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, OLMO3)
"""Of Hugging Face."""


def family_named(name: str) -> Family:
    """By short name (`llama`), class name (`LlamaForCausalLM`) or model type. Raises ConfigError for an unknown one."""
    for family in (*FAMILIES, META_LLAMA, *DIALECTS):
        if name in (family.name, family.hf, family.model_type):
            return family
    raise ConfigError(f"unknown architecture '{name}'", where="architecture", fix=f"one of {', '.join(f.name for f in FAMILIES)}")


def family_of(config: Mapping[str, Any]) -> Family:
    """By the content of a Hugging Face config.json."""
    names = config.get("architectures") or [config.get("model_type", "")]
    return family_named(names[0])


def neox_keys(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our flat keys for the model that a Hugging Face config describes. Raises ConfigError for what our model cannot be."""
    return {key: value for row in family.config for key, value in row.to_neox(config).items()}


Refusals = list[tuple[ConfigRow, ConfigError]]


def expressed(family: Family, keys: Mapping[str, Any], spec: ModelSpec) -> tuple[dict[str, Any], Refusals]:
    """The fields of our model in the Hugging Face form, and the rows that cannot express it, each with the reason.

    keys: our flat keys, resolved; spec: the model they describe
    """
    fields: dict[str, Any] = {}
    refusals: Refusals = []
    for row in family.config:
        try:
            fields.update(row.to_hf(keys, spec))
        except ConfigError as error:
            refusals.append((row, error))
    return fields, refusals


def hf_config(family: Family, keys: Mapping[str, Any], spec: ModelSpec, *, vocab_size: int | None = None) -> dict[str, Any]:
    """The Hugging Face config of our model.

    keys:       our flat keys, resolved; spec: the model they describe
    vocab_size: rows kept of the vocabulary; None = the padded size
    Raises ConfigError, naming the key, for what the family cannot express.
    """
    fields, refusals = expressed(family, keys, spec)
    for _, error in refusals:
        raise error
    return {"model_type": family.model_type, **fields, "vocab_size": spec.vocab_size if vocab_size is None else vocab_size}


B = "{slot}."
OURS, TE, LEGACY, LEGACY_LLAMA = "ours", "te", "legacy", "legacy_llama"
ATTENTIONS, MLPS, NORMS = (OURS, TE), (OURS, LEGACY, LEGACY_LLAMA, TE), (OURS, TE)
MLP_MARKS = {".mlp.fc1_": TE, ".mlp.dense_h_to_4h.": LEGACY, ".mlp.w1.": LEGACY_LLAMA}
TE_KEYS = ("te_mha", "te_layernorm_mlp", "te_columnparallel", "te_rowparallel", "te_fp8_mha")


def norm_rows(ours: str, theirs: str, *, absent: Residual | None = None) -> tuple[Row, ...]:
    """One norm, RMSNorm or LayerNorm. theirs: up to the parameter's name, weight or bias; absent: form of blocks without it"""

    def scaled(spec: ModelSpec) -> bool:
        return spec.final_norm.kind is NormKind.RMSNORM and spec.blocks[0].residual is not absent

    def weighted(spec: ModelSpec) -> bool:
        return spec.final_norm.kind is NormKind.LAYERNORM and spec.blocks[0].residual is not absent

    def biased(spec: ModelSpec) -> bool:
        return weighted(spec) and spec.final_norm.bias

    return (
        Row(f"{ours}.scale", f"{theirs}weight", when=scaled),
        Row(f"{ours}.weight", f"{theirs}weight", when=weighted),
        Row(f"{ours}.bias", f"{theirs}bias", when=biased),
    )


ATTENTION_ROWS = {
    OURS: (),
    TE: (
        *with_bias(B + "attention.query_key_value", B + "attention.qkv.", GroupQKV(), when=attention_bias),
        *with_bias(B + "attention.dense", B + "attention.proj.", when=output_bias),
    ),
}
MLP_ROWS = {
    OURS: (),
    LEGACY: (
        *with_bias(B + "mlp.linear1", B + "mlp.dense_h_to_4h.", when=mlp_bias),
        *with_bias(B + "mlp.linear2", B + "mlp.dense_4h_to_h.", when=mlp_bias),
    ),
    LEGACY_LLAMA: (
        *with_bias(B + "mlp.linear1", (B + "mlp.w3.", B + "mlp.w1."), Concat(0, 2), when=mlp_bias),  # w3 is the value, w1 the gate
        *with_bias(B + "mlp.linear2", B + "mlp.w2.", when=mlp_bias),
    ),
    TE: (
        *norm_rows(B + "post_attention_layernorm", B + "mlp.layer_norm_"),
        *with_bias(B + "mlp.linear1", B + "mlp.fc1_", GateFirst(), when=mlp_bias),
        *with_bias(B + "mlp.linear2", B + "mlp.fc2_", when=mlp_bias),
    ),
}
FIRST, SECOND, LAST = "input_layernorm", "post_attention_layernorm", "norm"
TE_NORM_ROWS = {
    FIRST: norm_rows(B + FIRST, B + f"{FIRST}.norm.", absent=Residual.POST_SUBLAYER),
    SECOND: norm_rows(B + SECOND, B + f"{SECOND}.norm.", absent=Residual.PARALLEL_TIED),
    LAST: norm_rows("{norm}.norm", "{norm}.norm.norm."),
}
SAME = (
    r"^0\.(word|position)_embeddings\.weight$",
    r"\.attention\.(qk_layernorm|q_norm|k_norm)\.(weight|bias|scale)$",
    r"\.attention\.(rotary_emb\.inv_freq|alibi_embed\.slopes|rpe\.weight)$",
    r"\.(final_linear|rm_linear)\.weight$",
)
ATTENTION_NAMES = r"\.attention\.(query_key_value|dense)\.(weight|bias)$"
MLP_NAMES = r"\.mlp\.linear[12]\.(weight|bias)$"


@dataclass(frozen=True)
class TeKeys:
    """The same keys but for those that ask for TransformerEngine's layers."""

    attention: bool
    mlp: bool
    norms: bool

    def to_neox(self, hf: Config) -> dict[str, Any]:
        """Without them. FORMAT: those layers always have biases, whatever the keys say."""
        keys = {key: value for key, value in hf.items() if key not in TE_KEYS}
        keys |= {"norm": str(hf["norm"]).removeprefix("te_")} if "norm" in hf else {}
        keys |= {"use_bias_in_attn_linear": True} if self.attention else {}
        return keys | ({"use_bias_in_mlp": True} if self.mlp else {})

    def to_hf(self, neox: Config, spec: ModelSpec) -> dict[str, Any]:
        """With them."""
        keys = dict(neox)
        keys |= {"te_mha": True} if self.attention else {}
        keys |= {"te_layernorm_mlp": True} if self.mlp else {}
        return keys | ({"norm": f"te_{neox.get('norm', 'layernorm')}"} if self.norms else {})


@cache
def dialect(attention: str = OURS, mlp: str = OURS, norms: str = OURS) -> Family:
    """The family of these forms."""
    parts = [f"te_{part}" for part, form in (("attention", attention), ("mlp", mlp), ("norms", norms)) if form == TE]
    parts = ["te", *parts[2:]] if attention == mlp == TE else parts
    name = "_".join(["neox", *parts, *([mlp] if mlp in (LEGACY, LEGACY_LLAMA) else [])])
    plain = [FIRST, LAST, "post_feedforward_layernorm", *([] if mlp == TE else [SECOND])]
    same = [*SAME, *([ATTENTION_NAMES] if attention == OURS else []), *([MLP_NAMES] if mlp == OURS else [])]
    rows = (*ATTENTION_ROWS[attention], *MLP_ROWS[mlp])
    if norms == TE:
        rows += tuple(row for norm in plain for row in TE_NORM_ROWS.get(norm, ()))
    else:
        same.append(rf"^\d+\.({'|'.join(plain)})\.(weight|bias|scale|g)$")
    return Family(
        name=name,
        hf=f"a {name} checkpoint",
        model_type=name,
        rows=rows,
        config=(TeKeys(attention == TE, mlp == TE, norms == TE),),
        ignored=(r"_extra_state$",) if parts else (),
        same=tuple(same),
    )


NEOX_LEGACY, NEOX_TE = dialect(mlp=LEGACY), dialect(TE, TE)
DIALECTS = tuple(dialect(*forms) for forms in product(ATTENTIONS, MLPS, NORMS) if forms != (OURS, OURS, OURS))


def dialect_of(names: Iterable[str]) -> Family | None:
    """The dialect that canonical-looking names, `<slot>.<parameter>`, are of; None = they are ours."""
    names = list(names)
    attention = TE if any(".attention.qkv." in name for name in names) else OURS
    norms = TE if any(re.search(r"norm\.norm\.(weight|bias)$", name) for name in names) else OURS
    mlp = next((form for mark, form in MLP_MARKS.items() if any(mark in name for name in names)), OURS)
    found = dialect(attention, mlp, norms)
    return found if found in DIALECTS else None


def canonical_weights(weights: Mapping[str, Tensor], spec: ModelSpec, *, ranks: int = 1) -> Mapping[str, Tensor]:
    """The weights of one of `ranks` tensor ranks under our names, whatever dialect they are in; made on access.

    spec: the whole model
    Raises CheckpointError, before any tensor is read, when names do not fit.
    """
    family = dialect_of(weights)
    return weights if family is None else to_canonical(family, weights, of_rank(spec, ranks))


def canonical_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys of a model in any dialect as those of the same model in ours."""
    asked = (bool(keys.get("te_mha")), bool(keys.get("te_layernorm_mlp")), str(keys.get("norm", "")).startswith("te_"))
    return TeKeys(*asked).to_neox(keys)


def of_rank(spec: ModelSpec, ranks: int) -> ModelSpec:
    """What one of `ranks` tensor ranks holds of a model, as a model. Raises ConfigError when the heads cannot be divided."""

    def part(block: BlockSpec) -> BlockSpec:
        heads = local_size(block.attention.num_heads, ranks, "num_attention_heads")
        kv_heads = local_size(block.attention.num_kv_heads, ranks, "num_kv_heads")
        return replace(block, mixer=replace(block.attention, num_heads=heads, num_kv_heads=kv_heads))

    return spec if ranks == 1 else replace(spec, blocks=tuple(map(part, spec.blocks)))
