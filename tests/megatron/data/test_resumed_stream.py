# SPDX-License-Identifier: Apache-2.0
"""A run that goes on in a later epoch sees the samples that it would have seen, whatever number of threads reads ahead."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.data.batch import Batch, counting_samples
from megatron.data.build import build_data
from megatron.neox_arguments import NeoXArgs
from tests.support.indexed import IndexedDatasetBuilder

DOCUMENTS, LENGTH = 10, 34  # 340 tokens: 20 samples of 17 an epoch
PER_EPOCH = DOCUMENTS * LENGTH // 17


def stream(path: Path, workers: int, start: int, count: int, *, micro: int = 2, rank: int = 0, size: int = 1) -> list[bytes]:
    """Rows of tokens from a global sample number on, over micro batches of this rank."""
    common = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 16, "max_position_embeddings": 16}
    run = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": micro, "global_num_gpus": size, "train_iters": 18, "eval_iters": 0}
    paths = {f"{split}_data_paths": [str(path)] for split in ("train", "valid", "test")}
    rest = {"tokenizer_type": "CharLevelTokenizer", "num_workers": workers, "optimizer": {"type": "Adam", "params": {"lr": 0.001}}}
    args = NeoXArgs.from_dict({**common, **run, **paths, **rest})
    data = build_data(args, streams=("text",), rank=rank, size=size)
    found = list(islice(data.train.batches(counting_samples(rows_of), start_sample=start), count // micro))
    assert all(batch.num_samples == micro for batch in found)
    return [row.numpy().tobytes() for batch in found for row in batch.tokens[: batch.num_samples]]


def rows_of(samples: Sequence[Any]) -> Batch:
    """Two rows for each sample, as a pair has: it counts as one sample all the same."""
    rows = torch.from_numpy(np.stack([sample["text"] for sample in samples])).repeat(2, 1)
    return Batch(tokens=rows, labels=rows, loss_weight=rows.float(), segment_ids=rows.int())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents in which every token is another number."""
    prefix = tmp_path / "numbers"
    with IndexedDatasetBuilder(prefix, np.int32) as builder:
        for number in range(DOCUMENTS):
            builder.add_document(list(range(number * LENGTH, (number + 1) * LENGTH)))
        builder.finalize()
    return prefix


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_in_the_third_epoch_goes_on_in_the_same_order(corpus: Path, workers: int) -> None:
    """72 samples of an epoch of 20: the third begins at the 40th."""
    whole = stream(corpus, 0, 0, 72)
    epochs = [whole[first : first + 20] for first in (0, 20, 40)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for start in (40, 48, 52):
        assert stream(corpus, workers, start, 72 - start) == whole[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_does_so_at_another_number_of_ranks(corpus: Path, workers: int) -> None:
    """Two ranks that go on where one was have its samples between them."""
    whole = stream(corpus, 0, 0, 72)
    ranks = [stream(corpus, workers, 48, 12, rank=rank, size=2) for rank in range(2)]
    pairs = zip(*(zip(rows[::2], rows[1::2], strict=True) for rows in ranks), strict=True)
    assert [row for both in pairs for micro in both for row in micro] == whole[48:]
