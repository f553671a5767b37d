# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs -> ModelSpec. The only reader of the keys that say what a model is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.errors import ConfigError
from megatron.model.spec import (
    GATED,
    AttentionSpec,
    BackendName,
    BlockSpec,
    EmbeddingSpec,
    HeadSpec,
    InitSpec,
    MLPSpec,
    ModelSpec,
    NormKind,
    NormSpec,
    Positions,
    Residual,
    RopeScaling,
    RotarySpec,
    RpeSpec,
    with_mup,
)
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.resolve import feed_forward_width
from megatron.neox_arguments.unfinished import refuse_value

LITERAL, TWO_THIRDS = "literal", "two_thirds"


def required(args: NeoXArgs, key: str) -> int:
    """A size of the model section that a model cannot do without. Raises ConfigError where it is not known."""
    value: int | None = getattr(args.model, key)
    if value is None:
        fix = "build the tokenizer first, or set it" if key == "padded_vocab_size" else "set it"
        raise ConfigError(f"'{key}' is not known", where=key, fix=fix)
    return value


def build_spec(args: NeoXArgs, *, mlp_convention: str | None = None) -> ModelSpec:
    """What the configuration, whose rules have been checked, says the model is.

    mlp_convention: literal | two_thirds, where a checkpoint showed it; wins over `intermediate_size_convention: auto`
    Raises ConfigError for what this model cannot be, naming the key.
    """
    refuse_unbuilt(args)
    model = args.model
    hidden, vocab = required(args, "hidden_size"), required(args, "padded_vocab_size")
    norm, mlp = norm_spec(args, hidden), mlp_spec(args, mlp_convention)
    block = BlockSpec(mixer=None, ffn=mlp, norm=norm, residual=residual_of(args), hidden_dropout=model.hidden_dropout)
    spec = ModelSpec(
        hidden_size=hidden,
        seq_length=required(args, "seq_length"),
        embedding=embedding_spec(args),
        blocks=tuple(replace(block, mixer=attention_spec(args, index)) for index in range(required(args, "num_layers"))),
        final_norm=norm,
        head=HeadSpec(hidden_size=hidden, vocab_size=vocab, block_rows=model.logits_block_rows),
        tied=not model.no_weight_tying,
        init=InitSpec(method=model.init_method, output_method=model.output_layer_init_method, std=model.init_method_std),
    )
    if not model.use_mup:
        return spec
    return with_mup(
        spec,
        width_mult=model.width_mult,
        init_scale=model.mup_init_scale,
        attn_temp=model.mup_attn_temp,
        output_temp=model.mup_output_temp,
        embedding_mult=model.mup_embedding_mult,
    )


def embedding_spec(args: NeoXArgs) -> EmbeddingSpec:
    """Token embedding, with the positions that are added to it."""
    positions = Positions(args.attention.pos_emb)
    added = positions in (Positions.LEARNED, Positions.SINUSOIDAL)
    return EmbeddingSpec(
        vocab_size=required(args, "padded_vocab_size"),
        hidden_size=required(args, "hidden_size"),
        positions=positions if added else Positions.NONE,
        max_positions=required(args, "max_position_embeddings") if added else 0,
        position_offset=args.attention.opt_pos_emb_offset if added else 0,
        dropout=args.model.hidden_dropout,
        position_multiplier=args.model.mup_rp_embedding_mult,
    )


UNBUILT = (
    "te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha",
    "moe_num_experts", "soft_prompt_tuning", "norm", "norm_placement",
)  # fmt: skip
"""Keys of the model section that may ask for what is not built yet."""


def refuse_unbuilt(args: NeoXArgs) -> None:
    """Raise ConfigError for a model that this code cannot build."""
    for key in UNBUILT:
        refuse_value(key, getattr(args.model, key))
    for name in args.attention.attention_config or []:
        if name not in ("global", "flash"):  # flash is the same exact attention by a fused kernel
            raise ConfigError(f"attention type '{name}' is not supported yet", where="attention_config", fix="use global or flash")


def norm_spec(args: NeoXArgs, size: int) -> NormSpec:
    """The model's kind of norm over `size` features."""
    model = args.model
    kind = NormKind(model.norm)
    eps = {NormKind.RMSNORM: model.rms_norm_epsilon, NormKind.SCALENORM: model.scalenorm_epsilon}.get(kind, model.layernorm_epsilon)
    return NormSpec(kind=kind, size=size, eps=eps, bias=model.use_bias_in_norms)


def residual_of(args: NeoXArgs) -> Residual:
    """How blocks add their sublayers."""
    model = args.model
    if model.norm_placement == "olmo3":
        return Residual.POST_SUBLAYER
    if model.gpt_j_residual:
        return Residual.PARALLEL_TIED if model.gpt_j_tied else Residual.PARALLEL
    return Residual.SEQUENTIAL


def attention_spec(args: NeoXArgs, index: int) -> AttentionSpec:
    """Attention of block `index`, counted from 0."""
    attention = args.attention
    hidden, heads = required(args, "hidden_size"), required(args, "num_attention_heads")
    head_dim = attention.head_dim or hidden // heads
    positions = Positions(attention.pos_emb)
    pattern = attention.sliding_window_pattern
    scaled = attention.apply_query_key_layer_scaling
    types = attention.attention_config or ["global"]
    window = pattern[index % len(pattern)] if pattern else attention.sliding_window_width
    stretched = attention.rope_scaling_layers == "all" or window is None
    return AttentionSpec(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=attention.num_kv_heads or heads,
        head_dim=head_dim,
        bias=args.model.use_bias_in_attn_linear,
        dense_bias=args.model.use_bias_in_attn_output,
        rotary=rotary_spec(args, head_dim, scaled=stretched) if positions is Positions.ROTARY else None,
        rpe=RpeSpec(num_buckets=attention.rpe_num_buckets, max_distance=attention.rpe_max_distance) if positions is Positions.RPE else None,
        alibi=positions is Positions.ALIBI,
        window=window,
        dropout=attention.attention_dropout,
        softmax_in_fp32=attention.attention_softmax_in_fp32 or scaled,
        logit_divisor=float(index + 1) if scaled else 1.0,
        qk_norm=norm_spec(args, head_dim) if attention.use_qk_layernorm else None,
        separate_qk_norms=attention.use_separate_qk_norms,
        norm_each_head=attention.qk_norm_each_head,
        isolated=attention.attention_over_documents == "isolated",
        flash=types[index % len(types)] == "flash",
        backend=BackendName(attention.attention_backend),
    )


def rotary_spec(args: NeoXArgs, head_dim: int, *, scaled: bool = True) -> RotarySpec:
    """Rotary positions on the first rotary_pct of a head. scaled: whether rope_scaling is for this layer."""
    attention = args.attention
    dim = int(head_dim * attention.rotary_pct)
    scaling = rope_scaling(attention.rope_scaling) if attention.rope_scaling and scaled else None
    return RotarySpec(dim=dim, base=float(attention.rotary_emb_base), scaling=scaling, save_freqs=attention.rotary_save_freqs_buffer)


def rope_scaling(given: dict[str, Any]) -> RopeScaling | None:
    """The `rope_scaling` dict (Hugging Face form). rope_type "default" is no scaling."""
    values = dict(given)
    kind = values.pop("rope_type", None) or values.pop("type", None)
    values.pop("type", None)
    if kind == "default":
        return None
    known = {name for name in RopeScaling.__dataclass_fields__ if name != "kind"}
    unknown = sorted(set(values) - known)
    if kind not in ("linear", "ntk", "yarn", "llama3") or unknown:
        what = f"unknown entry '{unknown[0]}' in rope_scaling" if unknown else f"unknown rope_type '{kind}' in rope_scaling"
        raise ConfigError(what, where="rope_scaling", fix=f"rope_type: linear, ntk, yarn or llama3; entries: {', '.join(sorted(known))}")
    return RopeScaling(kind=kind, **values)


def mlp_spec(args: NeoXArgs, convention: str | None) -> MLPSpec:
    """The feed-forward sublayer. bias_gelu_fusion means the tanh form of GELU: FORMAT, NeoX's fused kernel was an approximation."""
    model = args.model
    activation = "gelu_tanh" if model.activation == "gelu" and model.bias_gelu_fusion else model.activation
    return MLPSpec(
        hidden_size=required(args, "hidden_size"), width=mlp_width(args, convention), activation=activation, bias=model.use_bias_in_mlp
    )


def mlp_width(args: NeoXArgs, convention: str | None = None) -> int:
    """Columns of linear2, see `feed_forward_width`. convention: literal | two_thirds, where a checkpoint showed it"""
    model = args.model
    meant = model.intermediate_size_convention
    return feed_forward_width(
        required(args, "hidden_size"),
        model.intermediate_size,
        model.expansion_factor,
        multiple_of=model.mlp_multiple_of,
        gated=model.activation in GATED,
        literal=(convention or LITERAL if meant == "auto" else meant) == LITERAL,
    )


def mlp_convention_of(args: NeoXArgs, linear2_columns: int) -> str | None:
    """Which convention of a gated intermediate_size gives a checkpoint's width; None where neither does.

    linear2_columns: columns of mlp.linear2.weight summed over tensor ranks
    """
    return next((convention for convention in (LITERAL, TWO_THIRDS) if mlp_width(args, convention) == linear2_columns), None)
