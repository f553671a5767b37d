# SPDX-License-Identifier: Apache-2.0
"""A reward model's checkpoint becomes transformers' class for scores, whose scores are those that GPT-NeoX recorded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron.checkpoint.conversion import logit_compare
from megatron.checkpoint.conversion.build import describe_step, rewrite, to_hf, to_neox
from megatron.checkpoint.conversion.export import family_for
from megatron.checkpoint.conversion.model import ENDING, SCORED, Rewrite, ToHF, ToNeoX, scoring
from megatron.checkpoint.formats.hf_files import read_state
from megatron.checkpoint.formats.neox_files import read_weights
from megatron.checkpoint.mapping.families import FAMILIES, family_named
from megatron.errors import CheckpointError, ConfigError, NeoXError
from support.foreign import check_same, make_hf
from support.tree import ROOT

TRAIN = ROOT / "tests" / "golden" / "train"
RM = TRAIN / "rm" / "ckpt"
HEAD = "6.rm_linear.weight"


def export(source: Path, out: Path, **more: object) -> str:
    return to_hf(ToHF(**{"source": source, "out": out, "tokenizer": False, "pad_token_id": 0, **more}))  # type: ignore[arg-type]


def test_recorded_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = export(RM, tmp_path / "hf")
    assert "GPTNeoXForSequenceClassification; scores differ by at most" in told
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "conversion.json", "model.safetensors"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == "GPTNeoXForSequenceClassification"
    assert (model.config.num_labels, model.config.pad_token_id, model.score.weight.shape) == (1, 0, (1, 64))
    tokens = torch.from_numpy(np.load(TRAIN / "fixed_tokens.npy"))[:1].long()
    recorded = torch.from_numpy(np.load(TRAIN / "rm" / "logits_row0_step0.npy"))
    with torch.no_grad():
        scores = model.score(model.base_model(tokens).last_hidden_state)
        last = model(tokens).logits
    assert scores.shape == recorded.shape == (1, 64, 1) and recorded.std() > 0.1
    assert (scores - recorded).abs().max() <= 1e-5
    assert (tokens[0, -1] != 0) and (last - recorded[:, -1]).abs().max() <= 1e-5
    # written for another layout, the head is cut along its input, and it is whole again in the result
    rewrite(Rewrite(source=RM, out=tmp_path / "two", tensor=2, pipe=1))
    step = tmp_path / "two" / "global_step0"
    head = read_weights(RM / "global_step0")[HEAD]
    assert torch.equal(torch.cat([read_weights(step, rank)[HEAD] for rank in (0, 1)], 1), head)
    assert read_weights(step, 1)[HEAD].shape == (1, 32)
    export(tmp_path / "two", tmp_path / "both", verify=False)
    check_same(tmp_path / "both", dict(read_state(tmp_path / "hf")))
    assert torch.equal(read_state(tmp_path / "both")["score.weight"], head)
    # the comparison finds a head that is another one, whole or by layers
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    _, described = describe_step(RM / "global_step0")
    save_file({**tensors, "score.weight": tensors["score.weight"] * 1.01}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    for bound in (logit_compare.WHOLE_UP_TO, 0):
        monkeypatch.setattr(logit_compare, "WHOLE_UP_TO", bound)
        with pytest.raises(CheckpointError, match="not the same model: scores"):
            logit_compare.verify(RM / "global_step0", tmp_path / "hf", described, None, asked=None)
    assert "scores of a few layers differ" in export(RM, tmp_path / "again")


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in SCORED[2:])])
def test_other_families(name: str, tmp_path: Path) -> None:
    """Tied embeddings (GPT-2) or not; in half precision."""
    step = reward_checkpoint(tmp_path, name)
    assert f"{ENDING}; scores differ by at most" in export(step.parent, tmp_path / "out", pad_token_id=100)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].lower() == f"{name}{ENDING}".lower()
    assert config["pad_token_id"] == 100 and config["id2label"] == {"0": "LABEL_0"}


def reward_checkpoint(folder: Path, name: str) -> Path:
    """A random model with a reward model's head in place of its own."""
    make_hf(folder / "hf", name, dtype=torch.bfloat16)
    to_neox(ToNeoX(source=folder / "hf", out=folder / "neox", verify=False))
    step = folder / "neox" / "global_step0"
    (step / "MANIFEST.json").unlink()
    stored = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)
    stored["module"].pop("sequential.6.final_linear.weight", None)
    stored["module"][f"sequential.{HEAD}"] = torch.randn(1, 32, dtype=torch.bfloat16)
    torch.save(stored, step / "mp_rank_00_model_states.pt")
    with (step / "configs" / "neox_config.yml").open("a") as config:
        config.write("\ntrain_impl: rm\ndataset_impl: pairwise\npack_impl: unpacked\n")
        config.write("pos_train_data_paths: [a]\nneg_train_data_paths: [b]\n")
    return step


def test_every_class_exists() -> None:
    names = dir(transformers)  # without importing each
    for family in FAMILIES:
        if family.name in SCORED:
            assert scoring(family).hf in names
        else:
            with pytest.raises(ConfigError, match=f"transformers has no .*{ENDING}"):
                scoring(family)


def test_refusals(tmp_path: Path) -> None:
    def refused(words: str, **more: object) -> None:
        with pytest.raises(NeoXError) as caught:
            export(more.pop("source", RM), tmp_path / "out", **more)  # type: ignore[arg-type]
        assert words in str(caught.value) and caught.value.exit_code == 77
        assert not list(tmp_path.glob("out*"))

    refused("--pad-token-id N", pad_token_id=None)
    refused("512 is no id of a vocabulary of 512", pad_token_id=512)
    refused("transformers has no Olmo2ForSequenceClassification", architecture="olmo2")
    # a configuration that speaks of another head than the files have
    text = (RM / "global_step0" / "configs" / "config.yml").read_text()
    plain = tmp_path / "plain.yml"
    plain.write_text(text.replace("train_impl: rm", "train_impl: dpo"))
    refused("with train_impl: rm", configs=[plain])
    shutil.copytree(TRAIN / "neox_pp0" / "ckpt", tmp_path / "lm")
    refused("missing in the checkpoint: 6.rm_linear.weight", source=tmp_path / "lm", configs=[RM / "global_step0/configs/config.yml"])
    # the way back is refused by its name, and so is an export beside the training, which knows no --pad-token-id
    export(RM, tmp_path / "hf", verify=False)
    with pytest.raises(ConfigError, match="unknown architecture 'GPTNeoXForSequenceClassification'"):
        to_neox(ToNeoX(source=tmp_path / "hf", out=tmp_path / "back"))
    _, model = describe_step(RM / "global_step0")
    with pytest.raises(ConfigError, match="save_hf does not write reward models"):
        family_for(model.keys, model.spec)
    assert scoring(family_named("neox")).hf == "GPTNeoXForSequenceClassification"
