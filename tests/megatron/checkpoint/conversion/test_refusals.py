# SPDX-License-Identifier: Apache-2.0
"""What is damaged, missing or of another model is told by name, and leaves nothing behind; what is there is not replaced unasked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpoint.conversion.build import to_hf, to_neox
from megatron.checkpoint.conversion.model import ToHF, ToNeoX
from megatron.checkpoint.conversion.output_folder import written_aside
from megatron.errors import NeoXError
from support.foreign import make_hf

Change = Callable[[Path], object]


def cut(path: Path, keep: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:-keep])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def refused(out: Path, convert: Callable[[], object], words: str) -> None:
    with pytest.raises(NeoXError) as caught:
        convert()
    assert words in str(caught.value), str(caught.value)
    assert caught.value.exit_code == 77 and caught.value.where
    assert not out.exists() and not list(out.parent.glob(f"{out.name}*"))


def test_hugging_face_side(tmp_path: Path) -> None:
    cases: list[tuple[Change, str]] = [
        (lambda hf: cut(hf / "model-00002-of-00003.safetensors"), "damaged safetensors file"),
        (lambda hf: (hf / "model-00003-of-00003.safetensors").unlink(), "model-00003-of-00003.safetensors is missing"),
        (lambda hf: edit(hf / "config.json", intermediate_size=64), "(48, 32) in the file, (64, 32)"),
        (lambda hf: edit(hf / "config.json", num_hidden_layers=3), "missing model.layers.2."),
        (lambda hf: edit(hf / "config.json", num_hidden_layers=1), "claimed by no row model.layers.1."),
        (lambda hf: edit(hf / "config.json", architectures=["NoSuchModel"]), "unknown architecture 'NoSuchModel'"),
        (lambda hf: (hf / "config.json").write_text("{"), "not JSON"),
        (lambda hf: (hf / "config.json").unlink(), "config.json is missing"),
    ]
    make_hf(tmp_path / "whole", "llama", limit=40_000)
    out = tmp_path / "out"
    for number, (change, words) in enumerate(cases):
        hf = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", hf)
        change(hf)
        refused(out, lambda hf=hf: to_neox(ToNeoX(source=hf, out=out, verify=False)), words)
    refused(out, lambda: to_neox(ToNeoX(source=tmp_path / "whole", out=out, tensor=3, verify=False)), "3")
    refused(out, lambda: to_neox(ToNeoX(source=tmp_path / "whole", out=out, tensor=0, verify=False)), "no layout")


def test_neox_side(tmp_path: Path) -> None:
    cases: list[tuple[Change, str]] = [
        (lambda step: flip(step / "layer_03-model_01-model_states.pt"), "layer_03-model_01-model_states.pt: content differs"),
        (lambda step: (step / "layer_02-model_00-model_states.pt").unlink(), "layer_02-model_00-model_states.pt: missing"),
        # where no manifest tells it, the files themselves do
        (lambda step: bare(step, "layer_02-model_00-model_states.pt"), "missing in the checkpoint: 2.attention.dense.weight"),
        (lambda step: [bare(step, path.name) for path in step.glob("layer_*model_01*")], "other shapes"),
        (lambda step: [bare(step), cut(step / "layer_03-model_01-model_states.pt")], "layer_03-model_01-model_states.pt"),
    ]
    make_hf(tmp_path / "hf", "llama")
    to_neox(ToNeoX(source=tmp_path / "hf", out=tmp_path / "whole", tensor=2, pipe=1, verify=False))
    out = tmp_path / "out"
    for number, (change, words) in enumerate(cases):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        change(tmp_path / str(number) / "global_step0")
        refused(out, lambda number=number: to_hf(ToHF(source=tmp_path / str(number), out=out, verify=False)), words)
    config = tmp_path / "wrong.yml"
    text = (tmp_path / "whole" / "neox_config.yml").read_text()
    for change, words in (
        (("hidden_size: 32", "hidden_size: 64"), "other shapes"),
        (("num_layers: 2", "num_layers: 3"), "missing in the checkpoint: 4."),
        (("pos_emb: rotary", "pos_emb: alibi"), "no Hugging Face architecture can express this model"),
    ):
        config.write_text(text.replace(*change))
        refused(out, lambda: to_hf(ToHF(source=tmp_path / "whole", out=out, configs=[config], verify=False)), words)
    request = ToHF(source=tmp_path / "whole", out=out, architecture="neox", verify=False)
    refused(out, lambda: to_hf(request), "this architecture cannot express")
    refused(out, lambda: to_hf(ToHF(source=tmp_path / "whole", out=out, vocab_size=1000, verify=False)), "1000 rows of 102")


def bare(step: Path, *without: str) -> None:
    """A folder without a manifest, as GPT-NeoX writes it, and without these files."""
    for name in ("MANIFEST.json", *without):
        (step / name).unlink(missing_ok=True)


def test_output_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left").write_text("by a conversion that was killed")
    with written_aside(out, overwrite=False) as aside:
        (aside / "new").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(NeoXError, match="not empty"), written_aside(out, overwrite=False):
        pass
    with pytest.raises(RuntimeError), written_aside(out, overwrite=True):
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["out"]
    with written_aside(out, overwrite=True) as aside:
        (aside / "newer").write_text("2")
    assert [path.name for path in out.iterdir()] == ["newer"] and [path.name for path in tmp_path.iterdir()] == ["out"]
