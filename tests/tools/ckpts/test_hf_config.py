# SPDX-License-Identifier: Apache-2.0
"""The command that prints the configuration of a Hugging Face model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron.errors import CheckpointError, ConfigError
from support.hf import SIZES
from support.tree import ROOT


@pytest.fixture(scope="module")
def face() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hf_config_face", ROOT / "tools" / "ckpts" / "hf_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_to_the_screen_or_to_a_new_file(face: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], "intermediate_size": 128, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert face.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    keys = yaml.safe_load(printed)
    assert keys["load"] == f"hf:{tmp_path}" and keys["num_layers"] == 2 and keys["activation"] == "swiglu"
    out = tmp_path / "model.yml"
    assert face.main([f"hf:{tmp_path}", "--output", str(out)]) == 0 and out.read_text() == printed
    with pytest.raises(ConfigError, match="there already"):
        face.main([str(tmp_path), "--output", str(out)])
    with pytest.raises(CheckpointError, match="there is no folder"):
        face.main([str(tmp_path / "absent")])
