# SPDX-License-Identifier: Apache-2.0
"""The converters as they are called, with the flags of GPT-NeoX's scripts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron.errors import CheckpointError, NeoXError
from megatron.neox_arguments.cli import run_face
from support.tree import ROOT

FACES = {
    "tools/ckpts/convert_neox_to_hf.py": "--input_dir --config_file --output_dir --precision --no_save_tokenizer --vocab-is-hf-tokenizer "
    "--pad-token-id --architecture",
    "tools/ckpts/convert_hf_to_neox.py": "--hf-model --tp --pp --iteration --revision --output-dir",
    "tools/ckpts/convert_hf_llama_to_neox.py": "--tp --pp --model --model_path",
    "tools/ckpts/convert_raw_llama_weights_to_neox.py": "--input_dir --model_size --output_dir --num_output_shards --pipeline_parallel",
    "tools/ckpts/convert_hf_to_sequential.py": "--revision --output-dir --config --test --download-only --ckpt-tmp-dir --hf-model-name "
    "--cache-dir",
    "tools/ckpts/merge20b.py": "--input_dir --output_dir",
    "huggingface/convert_hf_gptneox_to_neox.py": "--hf-model --revision --output-dir --tp --pp --iteration --save-tokenizer "
    "--transformer-engine --no-transformer-engine",
    "huggingface/convert_hf_olmo_to_neox.py": "--hf-model --revision --output-dir --tp --iteration --save-tokenizer --dtype",
    "huggingface/convert_neox_olmo_to_hf.py": "--checkpoint-dir --hf-model --output-dir --push-to-hub --precision",
    "huggingface/convert_neox_to_hf_olmo.py": "--neox-checkpoint --reference-model --output-dir --dtype",
}


def face(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FACES)
def test_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag of the reference's script is there, and told by --help."""
    script = face(name)
    assert run_face(script.main, ["--help"], usage=script.USAGE, about=script.ABOUT) == 0
    told = capsys.readouterr().out.split()
    assert set(FACES[name].split()) | {"--overwrite", "--no-verify"} <= set(told)


def test_conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From one directory through every script that takes such a one, and back."""
    from support.foreign import check_same, make_hf

    monkeypatch.chdir(tmp_path)
    neox, llama, olmo = (make_hf(tmp_path / name, name) for name in ("neox", "llama", "olmo2"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(ROOT / "tests" / "golden" / "tokenizer" / name, tmp_path / "neox" / name)
    (tmp_path / "neox" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (tmp_path / "neox" / "chat_template.jinja").write_text("{{ messages }}")

    def run(name: str, *words: str) -> str:
        assert face(name).main([*words, "--no-verify"]) == 0
        return capsys.readouterr().out

    told = run("huggingface/convert_hf_gptneox_to_neox.py", *"--hf-model neox --tp 2 --iteration 3 --no-transformer-engine".split())
    assert "2 tensor ranks, no pipeline" in told and Path("checkpoints/neox/global_step3/mp_rank_01_model_states.pt").is_file()
    run("tools/ckpts/merge20b.py", *"--input_dir checkpoints/neox --output_dir merged".split())
    run("tools/ckpts/convert_neox_to_hf.py", *"--input_dir merged/global_step3 --output_dir back --vocab-size 101 --pad-token-id 1".split())
    check_same(tmp_path / "back", neox)
    files = {path.name for path in Path("back").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json"} <= files
    assert json.loads(Path("back/generation_config.json").read_text()) == {"max_new_tokens": 7}
    config = json.loads(Path("back/config.json").read_text())
    assert (config["architectures"], config["pad_token_id"]) == (["GPTNeoXForCausalLM"], 1)

    run("tools/ckpts/convert_hf_llama_to_neox.py", *"--model llama --model_path one --tp 2".split())
    run(
        "tools/ckpts/convert_hf_to_sequential.py",
        *"--hf-model-name llama --revision 5 --output-dir two --config one/neox_config.yml".split(),
    )
    assert Path("two/global_step5/mp_rank_01_model_states.pt").is_file()
    run("tools/ckpts/convert_neox_to_hf.py", *"--input_dir two --output_dir again --architecture llama".split())
    check_same(tmp_path / "again", llama)

    run("huggingface/convert_hf_olmo_to_neox.py", *"--hf-model olmo2 --output-dir olmo --tp 2 --dtype float32".split())
    run("huggingface/convert_neox_olmo_to_hf.py", *"--checkpoint-dir olmo --hf-model olmo2 --output-dir a --precision fp32".split())
    run(
        "huggingface/convert_neox_to_hf_olmo.py",
        *"--neox-checkpoint olmo/global_step0 --reference-model olmo2 --output-dir b --dtype float32".split(),
    )
    check_same(tmp_path / "a", olmo)
    check_same(tmp_path / "b", olmo)

    with pytest.raises(NeoXError, match="not empty"):
        run("tools/ckpts/convert_hf_to_neox.py", *"--hf-model llama --output-dir one".split())
    run("tools/ckpts/convert_hf_to_neox.py", *"--hf-model llama --output-dir one --pp 2 --overwrite".split())
    assert not Path("one/global_step0/mp_rank_02_model_states.pt").exists() and Path("one/global_step0/mp_rank_01_model_states.pt").exists()


def test_error(tmp_path: Path) -> None:
    """A report, no traceback, and the status of an input that must be fixed."""
    words = [sys.executable, str(ROOT / "tools" / "ckpts" / "convert_neox_to_hf.py"), "--input_dir", "none", "--output_dir", "out"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == CheckpointError.exit_code and "Traceback" not in done.stderr and "no checkpoint found" in done.stderr
    assert not list(tmp_path.iterdir())


def test_slurm(tmp_path: Path) -> None:
    """The job's script hands its words on, and leaves with the converter's status."""
    (tmp_path / "tools" / "ckpts").mkdir(parents=True)
    (tmp_path / "tools" / "ckpts" / "convert_hf_to_neox.py").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\nexit 77\n')
    python.chmod(0o755)
    script = ROOT / "huggingface" / "convert_hf_to_neox.sbatch"
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("NEOX_", "SLURM_", "VENV_", "OUTPUT_"))}

    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run(["bash", script, *words], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=30)
        return done.returncode, done.stdout.strip()

    told = "tools/ckpts/convert_hf_to_neox.py --hf-model org/sfm-model --iteration 5 --output-dir checkpoints/model --tp 2"
    assert run("org/sfm-model", "5", "--tp", "2") == (77, told)
    assert run("org/m")[1].endswith("--hf-model org/m --iteration 0 --output-dir checkpoints/m")
    assert run()[0] == 1
