# SPDX-License-Identifier: Apache-2.0
"""A converted model trains the same on one process and on four, from the configuration that the converter wrote."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.conversion.build import to_hf, to_neox
from megatron.checkpoint.conversion.model import Precision, ToHF, ToNeoX
from megatron.checkpoint.formats.hf_files import read_state
from support.foreign import make_hf
from support.tree import ROOT

DATA = ROOT / "tests" / "golden" / "train" / "data"
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"


def inputs(folder: Path, name: str) -> None:
    """A model with a tokenizer, and data."""
    make_hf(folder / "hf", name, vocab=512)
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, folder / "hf" / file.name)
    for file in DATA.glob("corpus_text_document.*"):
        shutil.copy(file, folder / file.name)


def losses(config: Path, data: Path, ranks: int, *more: str) -> list[float]:
    """Of three steps whose updates are large enough to show in the next loss."""
    words = ["--data_path", data, "--save", config.parent / "run", "--train_iters", "3", "--log_interval", "1", "--eval_iters", "0"]
    words += ["--lr", "0.01", "--warmup", "0", "--split", "100,0,0", "--global_num_gpus", str(ranks), *more]
    command = [sys.executable, ROOT / "deepy.py", ROOT / "train.py", config, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=280, cwd=config.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "successfully loaded" in done.stdout
    return [float(found) for found in re.findall(r"iteration +\d+/ .*?lm_loss: ([\d.E+-]+)", done.stdout)]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["neox", "llama"])
def test_one_process_and_four(name: str, tmp_path: Path) -> None:
    inputs(tmp_path, name)
    found = {}
    for tensor, pipe in ((1, 0), (2, 2)):
        out = tmp_path / f"{tensor}{pipe}"
        to_neox(ToNeoX(source=tmp_path / "hf", out=out, tensor=tensor, pipe=pipe, verify=False))
        found[tensor] = losses(out / "neox_config.yml", tmp_path / "corpus_text_document", tensor * max(1, pipe))
    assert len(found[1]) == 3 and found[1][0] != found[1][2]
    assert found[2] == pytest.approx(found[1], abs=2e-5)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_weights_spread_over_ranks(tmp_path: Path) -> None:
    """ZeRO-3 has no file with a whole weight. The result is in the run's precision, or has the float32 masters where somebody asks."""
    inputs(tmp_path, "neox")
    to_neox(ToNeoX(source=tmp_path / "hf", out=tmp_path / "neox", verify=False))
    config = tmp_path / "neox" / "neox_config.yml"
    losses(config, tmp_path / "corpus_text_document", 2, "--zero_optimization.stage", "3", "--precision", "bfloat16")
    found = {}
    for precision in (Precision.AUTO, Precision.FP32):
        to_hf(ToHF(source=tmp_path / "neox" / "run", out=tmp_path / precision, precision=precision, verify=True))
        found[precision] = dict(read_state(tmp_path / precision))
    assert {tensor.dtype for tensor in found[Precision.AUTO].values()} == {torch.bfloat16}
    for name, tensor in found[Precision.FP32].items():
        assert torch.equal(tensor.bfloat16(), found[Precision.AUTO][name]), name
