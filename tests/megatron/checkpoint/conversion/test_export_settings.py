# SPDX-License-Identifier: Apache-2.0
"""Finished checkpoints as Hugging Face folders: the same logits from every layout, whole or absent, refused beforehand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.conversion.build import require_exportable
from megatron.checkpoint.conversion.export import Export, family_for, tokenizer_file
from megatron.checkpoint.formats.hf_files import read_state
from megatron.checkpoint.mapping.families import family_named
from megatron.errors import CheckpointError, ConfigError
from megatron.model.build_spec import build_spec
from megatron.neox_arguments import NeoXArgs
from support.hf import GOLDEN
from support.tiny import tiny

TRAIN = GOLDEN / "train"


def args_of(style: str, **changes: Any) -> NeoXArgs:
    files = {"vocab_file": str(GOLDEN / "tokenizer" / "tokenizer.json"), "padded_vocab_size": 512}
    return NeoXArgs.from_dict(tiny(style, **{**files, **changes}))


def export_of(args: NeoXArgs, **changes: Any) -> Export:
    spec, keys = build_spec(args), args.to_flat()
    file = tokenizer_file("HFTokenizer", args.data.vocab_file)
    given = {"family": family_for(keys, spec), "keys": keys, "spec": spec, "dtype": torch.float32, "tokenizer": file}
    return Export(**{**given, **changes})


def step_of(name: str) -> Path:
    return TRAIN / name / "ckpt" / "global_step0"


def test_every_layout_gives_the_checkpoints_logits(tmp_path: Path) -> None:
    """In transformers, with the tokenizer beside it; fewer rows and another type on request."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron.generation.build import load_model

    tokens = torch.randint(0, 500, (2, 30), generator=torch.Generator().manual_seed(0))
    for name in ("neox_tp2", "neox_pp2", "llama_pp1"):
        args = args_of("llama" if "llama" in name else "neox", load=str(TRAIN / name / "ckpt"))
        ours = load_model(args).model
        export_of(args, spec=ours.spec).write(step_of(name), tmp_path / name)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager").eval()
        with torch.no_grad():
            assert (theirs(tokens).logits - ours(tokens).full()).abs().max() < 1e-5, name
        assert AutoTokenizer.from_pretrained(tmp_path / name).encode("import os") != []
    export_of(args, spec=ours.spec, dtype=torch.bfloat16, rows=500, fields={"eos_token_id": 7}).write(step_of(name), tmp_path / name)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
    assert cut.dtype == torch.bfloat16 and cut.config.vocab_size == 500 == cut.lm_head.weight.shape[0] and cut.config.eos_token_id == 7
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_state(tmp_path / name).values())
    assert not list(tmp_path.glob("*.*")), "nothing is left beside the folders"
    assert (tmp_path / name / "model.safetensors").stat().st_mode == (tmp_path / name / "config.json").stat().st_mode


def test_a_failed_export_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    args = args_of("neox")
    shutil.copytree(step_of("neox_tp2"), tmp_path / "step")
    export_of(args).write(tmp_path / "step", tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "step" / "mp_rank_01_model_states.pt").write_bytes(b"PK, but cut off")
    with pytest.raises(CheckpointError, match="cannot be read|damaged"):
        export_of(args).write(tmp_path / "step", tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step"]


@pytest.mark.parametrize(
    ("style", "changes", "keys"),
    [
        ("neox", {"pos_emb": "alibi"}, ["pos_emb"]),
        ("llama", {"norm": "scalenorm", "mup_rp_embedding_mult": 2.0}, ["norm", "mup_rp_embedding_mult"]),
    ],
)
def test_what_no_architecture_can_be_is_refused_by_name(style: str, changes: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        require_exportable(args_of(style, save="out", checkpoint_factor=10, save_hf=True, **changes))
    assert set(keys) == set(str(caught.value.where).split(", "))
    assert all(key in caught.value.what for key in keys) and "save_hf" in caught.value.report()
    require_exportable(args_of(style, save="out", checkpoint_factor=10, **changes))
    require_exportable(args_of(style, save="out", checkpoint_factor=10, save_hf=20))


def test_the_architecture_that_it_came_from_is_kept_where_it_can_be() -> None:
    args = args_of("llama")
    spec, keys = build_spec(args), args.to_flat()
    assert family_for(keys, spec).hf == "LlamaForCausalLM"
    assert family_for(keys, spec, "MistralForCausalLM") is family_named("mistral")
    assert family_for(keys, spec, "GPTNeoXForCausalLM").hf == "LlamaForCausalLM"


def test_a_folder_or_a_file_names_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    assert tokenizer_file("HFTokenizer", str(tmp_path)) == tokenizer_file("HFTokenizer", str(tmp_path / "tokenizer.json"))
    assert tokenizer_file("SPMTokenizer", str(tmp_path)) is None and tokenizer_file("HFTokenizer", None) is None
