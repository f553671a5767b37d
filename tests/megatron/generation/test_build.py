# SPDX-License-Identifier: Apache-2.0
"""From a configuration to text and to logits, on recorded checkpoints."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import CheckpointError, ConfigError, DataError
from support.tiny import tiny

GOLDEN = Path(__file__).parents[2] / "golden"
TRAIN = GOLDEN / "train"


def arguments(**overrides: Any) -> Any:
    from megatron.neox_arguments import NeoXArgs

    given = {"load": str(TRAIN / "neox_pp0" / "ckpt"), "vocab_file": str(GOLDEN / "tokenizer" / "tokenizer.json"), **overrides}
    return NeoXArgs.from_dict(tiny("neox", **given))


def split_in_two(source: Path, target: Path, spec: Any) -> None:
    """The same weights as two tensor ranks would have written them."""
    import torch

    from megatron.checkpoint.formats.neox_files import read_weights
    from megatron.model.transformer import Transformer
    from megatron.mpu.groups import Group, Groups
    from megatron.mpu.sharding import sharding_of, split

    table = sharding_of(Transformer(spec, groups=Groups(tp=Group(rank=0, size=2, ranks=(0, 1))), device="meta"))
    target.mkdir(parents=True)
    weights = {f"sequential.{name}": tensor for name, tensor in read_weights(source).items()}
    for rank in range(2):
        shard = {name: split(tensor, table[name], rank, 2).clone() for name, tensor in weights.items()}
        torch.save({"module": shard}, target / f"mp_rank_{rank:02d}_model_states.pt")


def test_logits_tool_is_the_model_at_any_layout(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from megatron.generation.build import load_model
    from megatron.generation.modes import write_logits

    tokens = np.load(TRAIN / "fixed_tokens.npy")
    model = load_model(arguments()).model
    shape = write_logits(model, TRAIN / "fixed_tokens.npy", tmp_path / "new" / "logits.npy", rows=len(tokens))
    logits = np.load(tmp_path / "new" / "logits.npy")
    assert shape == logits.shape == (*tokens.shape, 512) and logits.dtype == np.float32
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["logits.npy"]
    with torch.no_grad():
        np.testing.assert_allclose(logits[1], model(torch.from_numpy(tokens[1:2].astype(np.int64))).full()[0].numpy(), atol=2e-6)
    split_in_two(TRAIN / "neox_pp0" / "ckpt" / "global_step0", tmp_path / "tp2" / "global_step3", model.spec)
    halves = load_model(arguments(load=str(tmp_path / "tp2"), iteration=3)).model
    write_logits(halves, TRAIN / "fixed_tokens.npy", tmp_path / "halves.npy")
    np.testing.assert_allclose(np.load(tmp_path / "halves.npy"), logits, atol=2e-6)
    np.save(tmp_path / "flat.npy", tokens[0])
    np.save(tmp_path / "large.npy", tokens + 512)
    for name, what in (("flat.npy", "holds"), ("large.npy", "not 0 to 511"), ("absent.npy", "there is no")):
        with pytest.raises(DataError, match=what):
            write_logits(model, tmp_path / name, tmp_path / "never.npy")
    assert not list(tmp_path.glob("never*"))


def test_generate_from_a_configuration(tmp_path: Path) -> None:
    from megatron.generation.build import generate, load_model

    (tmp_path / "prompts").write_text("import os\nThe\n", encoding="utf-8")
    common = {"maximum_tokens": 5, "sample_output_file": str(tmp_path / "out.jsonl")}
    silent = io.StringIO()
    assert generate(arguments(sample_input_file=str(tmp_path / "prompts"), **common), silent, silent) == tmp_path / "out.jsonl"
    greedy = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["context"] for record in greedy] == ["import os", "The"] and all(record["length"] <= 5 for record in greedy)
    generate(arguments(sample_input_file=str(tmp_path / "prompts"), recompute=True, return_logits=True, **common), silent, silent)
    again = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["text"] for record in again] == [record["text"] for record in greedy]
    assert len(again[0]["logits"]) == again[0]["length"] and len(again[0]["logits"][0]) == 512
    generate(arguments(num_samples=3, temperature=1.0, **common), silent, silent)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    screen = io.StringIO()
    assert generate(arguments(text_gen_type="interactive", **common), io.StringIO("import os\n\n"), screen) is None
    assert f"Generated Text: {greedy[0]['text']}\n" in screen.getvalue()

    with pytest.raises(ConfigError, match="precompute"):
        generate(arguments(text_gen_type="precompute"), silent, silent)
    with pytest.raises(ConfigError, match="no checkpoint is named"):
        load_model(arguments(load=None))
    with pytest.raises(CheckpointError, match="no checkpoint of iteration 99"):
        load_model(arguments(iteration=99))
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "larger")
    content = json.loads((tmp_path / "larger" / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 512, "content": "<|more|>"})
    (tmp_path / "larger" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="513 ids, the checkpoint only 512"):
        generate(arguments(vocab_file=str(tmp_path / "larger")), silent, silent)
