# SPDX-License-Identifier: Apache-2.0
"""Tiny random Hugging Face models in folders, and configurations that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny import tiny
from support.tree import ROOT

GOLDEN = ROOT / "tests" / "golden"
LENGTH, VOCAB = 64, 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "attn_implementation": "eager",
}


def hf_model(kind: str, folder: Path, **changes: Any) -> Any:
    """A model saved to `folder` in which no weight is at a trivial value. kind: neox | llama."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

    own: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2} if kind == "llama" else {"intermediate_size": 256}
    config = (LlamaConfig if kind == "llama" else GPTNeoXConfig)(**{**SIZES, **own, "bos_token_id": 0, "eos_token_id": 0, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def fitting(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """The flat configuration of such a model that starts from it, on the recorded corpus."""
    own = {"intermediate_size_convention": "literal"} if kind == "llama" else {}
    files = {"vocab_file": str(GOLDEN / "tokenizer" / "tokenizer.json"), "load": f"hf:{folder}"}
    return tiny(kind, **{**own, **files, "attention_over_documents": "joined", **changes})
