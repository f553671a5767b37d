# SPDX-License-Identifier: Apache-2.0
"""Hugging Face -> NeoX at a layout -> Hugging Face gives the same bits, whatever the family, the dtype and the vocabulary."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron.checkpoint.conversion.build import describe_step, rewrite, to_hf, to_neox
from megatron.checkpoint.conversion.model import Precision, Rewrite, ToHF, ToNeoX
from megatron.checkpoint.conversion.weights import Whole
from megatron.checkpoint.formats.hf_files import read_state
from megatron.checkpoint.formats.neox_files import read_weights
from megatron.checkpoint.loading.merge_tp import shapes_of
from megatron.checkpoint.mapping.families import hf_config
from megatron.checkpoint.mapping.meta_llama import META_LLAMA
from megatron.checkpoint.mapping.rows import from_canonical
from megatron.checkpoint.steps.manifest import Verify, look_at
from megatron.model.build_spec import build_spec
from megatron.neox_arguments import NeoXArgs
from support.foreign import CONFIGS, check_same, make_hf

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = (("neox", 2, 1, torch.bfloat16), ("llama", 2, 0, torch.float16), ("gpt2", 1, 2, torch.float32), ("qwen3", 2, 2, torch.bfloat16))


def there_and_back(folder: Path, name: str, tensor: int, pipe: int, dtype: torch.dtype) -> Path:
    tensors = make_hf(folder / "hf", name, dtype=dtype, limit=20_000)
    to_neox(ToNeoX(source=folder / "hf", out=folder / "neox", tensor=tensor, pipe=pipe, iteration=7, verify=False))
    to_hf(ToHF(source=folder / "neox", out=folder / "back", verify=False))
    check_same(folder / "back", tensors)
    return folder


@pytest.mark.parametrize("case", FEW, ids=lambda case: f"{case[0]}-tp{case[1]}-pp{case[2]}")
def test_bits(case, tmp_path: Path) -> None:
    """101 rows of vocabulary: odd, and filled up for two ranks."""
    name, tensor, pipe, dtype = case
    there_and_back(tmp_path, name, tensor, pipe, dtype)
    step = tmp_path / "neox" / "global_step7"
    assert (tmp_path / "neox" / "latest").read_text() == step.name
    assert look_at(step, Verify.FULL).whole
    assert len(list(step.glob("layer_*"))) == (0 if pipe == 0 else tensor * (4 + (name != "gpt2")))
    assert len(list(step.glob("mp_rank_*"))) == tensor * max(1, pipe)
    # the configuration beside it is of the same model
    keys = yaml.safe_load((tmp_path / "neox" / "neox_config.yml").read_text())
    args = NeoXArgs.from_ymls([tmp_path / "neox" / "neox_config.yml"], overwrites={"global_num_gpus": tensor * max(1, pipe)})
    spec = build_spec(args)
    assert keys["load"] == str(tmp_path / "neox") and keys["finetune"] is True and args.model.padded_vocab_size % tensor == 0
    assert set(shapes_of(spec)) == set(read_weights(step))
    made, back = (json.loads((tmp_path / folder / "conversion.json").read_text())["tensors"] for folder in ("neox", "back"))
    assert made == back and all(len(row["xxh128"]) == 32 for row in made.values())


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", list(itertools.product((1, 2), (0, 1, 2))), ids=str)
def test_every_cell(name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    for number, dtype in enumerate(DTYPES):
        folder = tmp_path / str(number)
        folder.mkdir()
        there_and_back(folder, name, *layout, dtype)


def test_rewrite_and_dialects(tmp_path: Path) -> None:
    """Two tensor ranks in the names of TransformerEngine become one rank in ours, and that the directory they came from."""
    tensors = make_hf(tmp_path / "hf", "neox")
    to_neox(ToNeoX(source=tmp_path / "hf", out=tmp_path / "te", tensor=2, dialect="neox_te", verify=False))
    assert any("mlp.fc1_weight" in name for name in read_weights(tmp_path / "te" / "global_step0"))
    rewrite(Rewrite(source=tmp_path / "te", out=tmp_path / "one", tensor=1, pipe=1))
    assert not (tmp_path / "one" / "global_step0" / "layer_02-model_01-model_states.pt").exists()
    to_hf(ToHF(source=tmp_path / "one", out=tmp_path / "back", vocab_size=101, verify=False))
    check_same(tmp_path / "back", tensors)


def test_raw_llama(tmp_path: Path) -> None:
    """Meta's files of a model become the checkpoint that its Hugging Face directory becomes."""
    make_hf(tmp_path / "hf", "llama", vocab=128)
    to_neox(ToNeoX(source=tmp_path / "hf", out=tmp_path / "neox", verify=False))
    _, model = describe_step(tmp_path / "neox" / "global_step0")
    raw = tmp_path / "raw"
    raw.mkdir()
    weights = read_weights(tmp_path / "neox" / "global_step0")
    torch.save(dict(from_canonical(META_LLAMA, weights, model.spec)), raw / "consolidated.00.pth")
    (raw / "params.json").write_text(json.dumps(hf_config(META_LLAMA, model.keys, model.spec)))
    to_neox(ToNeoX(source=raw, out=tmp_path / "again", tensor=2, pipe=1))
    _, again = describe_step(tmp_path / "again" / "global_step0")
    found = Whole(tmp_path / "again" / "global_step0", again).state()
    assert again.spec.blocks == model.spec.blocks and set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_precision(tmp_path: Path) -> None:
    tensors = make_hf(tmp_path / "hf", "llama")
    to_neox(ToNeoX(source=tmp_path / "hf", out=tmp_path / "neox", precision=Precision.BF16, verify=False))
    assert {tensor.dtype for tensor in read_weights(tmp_path / "neox" / "global_step0").values()} == {torch.bfloat16}
    assert "precision: bfloat16" in (tmp_path / "neox" / "neox_config.yml").read_text()
    for precision, dtype in ((Precision.AUTO, torch.bfloat16), (Precision.FP32, torch.float32), (Precision.FP16, torch.float16)):
        out = tmp_path / precision.value
        to_hf(ToHF(source=tmp_path / "neox", out=out, precision=precision, verify=False))
        found = read_state(out)
        assert all(torch.equal(found[name], tensor.bfloat16().to(dtype)) for name, tensor in tensors.items())
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
