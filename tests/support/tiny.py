# SPDX-License-Identifier: Apache-2.0
"""Tiny models as flat configurations, one per family of dense models. Builds nothing."""

from __future__ import annotations

import copy
from typing import Any

COMMON: dict[str, Any] = {
    "pipe_parallel_size": 0,
    "model_parallel_size": 1,
    "global_num_gpus": 1,
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "attention_config": [[["global"], 2]],
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "scaled_upper_triang_masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "min_lr": 1.0e-4,
    "zero_optimization": {"stage": 0},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "weight_decay": 0.1,
    "hidden_dropout": 0,
    "attention_dropout": 0,
    "train_iters": 8,
    "lr_decay_iters": 8,
    "lr_decay_style": "cosine",
    "warmup": 0.25,
    "distributed_backend": "gloo",
    "data_impl": "mmap",
    "num_workers": 0,
    "eval_interval": 1000,
    "eval_iters": 0,
    "log_interval": 1,
    "steps_per_print": 1,
    "tokenizer_type": "HFTokenizer",
    "checkpoint_activations": False,
    "seed": 1234,
}

STYLES: dict[str, dict[str, Any]] = {
    # GPT-NeoX / Pythia: rotary on a quarter of each head, attention and MLP in parallel
    "neox": {
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "no_weight_tying": True,
        "gpt_j_residual": True,
        "make_vocab_size_divisible_by": 128,
    },
    # GPT-2: learned positions, tied embeddings
    "gpt2": {
        "pos_emb": "learned",
        "no_weight_tying": False,
        "gpt_j_residual": False,
        "make_vocab_size_divisible_by": 128,
    },
    # LLaMA: RMSNorm, SwiGLU, grouped key/value heads, no biases
    "llama": {
        "pos_emb": "rotary",
        "rotary_pct": 1,
        "rotary_emb_base": 10000,
        "no_weight_tying": True,
        "gpt_j_residual": False,
        "make_vocab_size_divisible_by": 1,
        "intermediate_size": 128,
        "mlp_multiple_of": 128,
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1.0e-6,
        "activation": "swiglu",
        "num_kv_heads": 2,
        "use_bias_in_norms": False,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
}


def tiny(style: str = "neox", **overrides: Any) -> dict[str, Any]:
    """A fresh flat configuration of a 2-layer model of 64 features in one of the STYLES.

    An override of None removes the key.
    """
    flat = copy.deepcopy({**COMMON, **STYLES[style], **overrides})
    return {key: value for key, value in flat.items() if value is not None}
