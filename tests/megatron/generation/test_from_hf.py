# SPDX-License-Identifier: Apache-2.0
"""generate.py and eval.py on a Hugging Face folder: transformers' own continuation and loss."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from support.hf import GOLDEN, fitting, hf_model


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    """The vocabulary's size comes from the model."""
    import torch

    from megatron.generation.build import generate, load_model
    from megatron.neox_arguments import NeoXArgs
    from megatron.tokenizer.build import build_tokenizer

    theirs = hf_model("llama", tmp_path / "llama")
    (tmp_path / "prompts").write_text("import os\n", encoding="utf-8")
    files = {"sample_input_file": str(tmp_path / "prompts"), "sample_output_file": str(tmp_path / "out.jsonl")}
    args = NeoXArgs.from_dict(fitting("llama", tmp_path / "llama", maximum_tokens=12, return_logits=True, **files))
    generate(args, io.StringIO(), io.StringIO())
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tokenizer = build_tokenizer(args)
    ids = torch.tensor([tokenizer.encode("import os")])
    told = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    words = [int(token) for token in told if token != tokenizer.eod]
    assert record["text"] == tokenizer.decode(words) and record["length"] == len(words) > 3
    with torch.no_grad():
        logits = load_model(args).model(ids).full()
        assert (logits - theirs(ids).logits).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="num_layers: 3 here, 2 in the model"):
        load_model(NeoXArgs.from_dict(fitting("llama", tmp_path / "llama", num_layers=3, attention_config=None)))


@pytest.mark.full
def test_the_validation_loss_is_that_of_transformers(tmp_path: Path) -> None:
    import torch

    from megatron.data.build import build_data
    from megatron.evaluation.build import evaluate
    from megatron.neox_arguments import NeoXArgs
    from megatron.objectives.build import build_objective

    theirs = hf_model("neox", tmp_path / "neox")
    corpus = str(GOLDEN / "train" / "data" / "corpus_text_document")
    data = {**{f"{split}_data_paths": [corpus] for split in ("train", "valid", "test")}, "index_map_dir": str(tmp_path), "eval_iters": 2}
    args = NeoXArgs.from_dict(fitting("neox", tmp_path / "neox", eval_interval=8, **data))
    found = evaluate(args)["results"]["validation"]["lm_loss"]
    objective = build_objective(args, eod=0)
    valid = build_data(args, streams=objective.streams).valid
    assert valid is not None
    losses = []
    batches = valid.batches(objective.collate, start_sample=0)
    for _ in range(2 * (args.run.gradient_accumulation_steps or 1)):
        batch = next(batches)
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(theirs(batch.tokens).logits.flatten(0, 1), batch.labels.flatten()).item())
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-6)
