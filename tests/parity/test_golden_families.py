# SPDX-License-Identifier: Apache-2.0
"""Tiny OLMo-3 models with the logits of transformers, and digests of what GPT-NeoX's own converters write."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpoint.formats.neox_files import load_canonical
from megatron.checkpoint.mapping.families import NEOX_LEGACY, NEOX_TE, canonical_weights, family_of, neox_keys
from megatron.checkpoint.mapping.rows import Family, from_canonical, to_canonical
from megatron.model.build_spec import build_spec
from megatron.model.transformer import Transformer
from megatron.neox_arguments import NeoXArgs

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RUN = {"train_micro_batch_size_per_gpu": 1, "train_iters": 1, "global_num_gpus": 1, "attention_over_documents": "joined"}
DIGESTS = json.loads((GOLDEN / "convert" / "sha256.json").read_text())


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["olmo3_mha", "olmo3_gqa"])
def test_olmo3(name: str) -> None:
    config = json.loads((GOLDEN / "convert" / f"{name}.config.json").read_text())
    family = family_of(config)
    spec = build_spec(NeoXArgs.from_dict({**RUN, **neox_keys(family, config)}))
    state = to_canonical(family, load_file(GOLDEN / "convert" / f"{name}.safetensors"), spec)
    assert {key: digest(state[key]) for key in state} == DIGESTS[name]
    model = Transformer(spec).eval()
    load_canonical(model, state)
    tokens = torch.from_numpy(np.load(GOLDEN / "train" / "fixed_tokens.npy").astype(np.int64))
    with torch.no_grad():
        ours = model(tokens).full()[0, ::8]
    assert np.abs(ours.numpy() - np.load(GOLDEN / "convert" / f"{name}.logits_row0_every8th.npy")).max() < 1e-5


@pytest.mark.parametrize("family", [NEOX_TE, NEOX_LEGACY], ids=lambda family: family.name)
def test_dialects(family: Family) -> None:
    """The same weights under other names, as GPT-NeoX's converter writes them, which is always in fp16."""
    args = NeoXArgs.from_ymls([str(GOLDEN / "train" / "neox_pp0" / "config.yml")], overwrites={"padded_vocab_size": 512})
    spec = build_spec(args)
    weights = load_file(GOLDEN / "train" / "weights" / "neox_pp0_step8.safetensors")
    state = {name: tensor.half() for name, tensor in weights.items()}
    spoken = from_canonical(family, state, spec)
    assert {key: digest(spoken[key]) for key in spoken} == DIGESTS[family.name]
    again = canonical_weights(spoken, spec)
    assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)
