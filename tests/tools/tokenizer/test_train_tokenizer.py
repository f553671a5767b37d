# SPDX-License-Identifier: Apache-2.0
"""The training command as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron.tokenizer.hugging_face import open_hf

SCRIPT = Path(__file__).parents[3] / "tools" / "tokenizer" / "train_tokenizer.py"


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=60, cwd=SCRIPT.parent)


def test_json_lines_and_plain_text_give_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    text = SCRIPT.read_text(encoding="utf-8")
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    said = call("--json_input_dir", str(tmp_path / "in"), "--tokenizer_output_path", str(tmp_path / "tok" / "my.json"), "-v", "280")
    assert said.returncode == 0 and "280 ids" in said.stdout, said.stderr
    tokenizer = open_hf(str(tmp_path / "tok" / "my.json"))
    assert (tokenizer.eod, tokenizer.pad, tokenizer.decode(tokenizer.encode(text))) == (0, 1, text)
    plain = call(
        "--input", str(SCRIPT), "--tokenizer_output_path", str(tmp_path / "plain"), "--tokenizer_type", "BPE", "--vocab_size", "280"
    )
    assert plain.returncode == 0
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (tmp_path / "tok" / "my.json").read_bytes()
    bad = call("--input", str(tmp_path / "absent"), "--tokenizer_output_path", str(tmp_path / "x.json"))
    assert bad.returncode == 77 and "there is no" in bad.stderr and "Traceback" not in bad.stderr
