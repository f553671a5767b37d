# SPDX-License-Identifier: Apache-2.0
"""From a config to micro batches: the recorded runs of the reference, splits, mixtures, epochs, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.build import build_data
from megatron.data.loader import DataSplit
from megatron.data.streams import Item
from megatron.errors import ConfigError, DataError
from megatron.neox_arguments import NeoXArgs
from tests.support.indexed import IndexedDatasetBuilder

GOLDEN = Path(__file__).parents[2] / "golden" / "samples"
FILES = {
    "corpus_text_document": "corpus",
    "chat_document": "chat",
    "chat_label_document": "chat_label",
}


def flat(**keys: Any) -> NeoXArgs:
    """A small config with the given data keys."""
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 16, "max_position_embeddings": 16}
    run = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "global_num_gpus": 1, "train_iters": 6, "eval_iters": 0}
    tokenizer = {"tokenizer_type": "CharLevelTokenizer", "num_workers": 0}
    optimizer = {"optimizer": {"type": "Adam", "params": {"lr": 0.001}}}
    return NeoXArgs.from_dict({**model, **run, **tokenizer, **optimizer, **keys})


def stacked(samples: Any) -> Any:
    """Stands in for an objective's collate."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def numbered(prefix: Path, documents: int, start: int = 0, length: int = 20) -> str:
    """Documents of `length` tokens, each repeating its own number."""
    with IndexedDatasetBuilder(prefix, np.int32) as builder:
        for number in range(start, start + documents):
            builder.add_document([number] * length)
        builder.finalize()
    return str(prefix)


@pytest.mark.parametrize("run", ["neox_pp0", "neox_dp2", "sft_packed", "sft_unpacked"])
def test_micro_batches_of_the_reference(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, labels and masks of every recorded training micro batch of rank 0, from the recorded config."""
    (tmp_path / "data").mkdir()
    for ours, theirs in FILES.items():
        for ending in (".bin", ".idx"):
            shutil.copy(GOLDEN / "data" / f"{theirs}{ending}", tmp_path / "data" / f"{ours}{ending}")
    monkeypatch.chdir(tmp_path)
    args = NeoXArgs.from_ymls([str(GOLDEN / "train" / run / "config.yml")], overwrites={"save": None})
    labelled = bool(args.data.train_label_data_paths)
    data = build_data(args, streams=("text", "label") if labelled else ("text",), rank=0, size=2 if run == "neox_dp2" else 1)
    recorded = np.load(GOLDEN / "train" / run / "microbatches.npz")
    micro_batches = 8 * int(args.run.gradient_accumulation_steps or 1)
    batches = data.train.batches(stacked)
    for i in range(micro_batches):
        batch: dict[str, np.ndarray] = next(batches)  # type: ignore[assignment]
        text, recorded_tokens = batch["text"].copy(), recorded["tokens"][i]
        trained = batch["label"][:, 1:] >= 0 if labelled else np.ones_like(recorded_tokens, dtype=bool)
        np.testing.assert_array_equal(trained, recorded["loss_mask"][i] > 0)
        np.testing.assert_array_equal(text[:, 1:][trained], recorded["labels"][i][trained])
        if run == "sft_unpacked":
            # Each of these documents is longer than a row: no room for the token that leaks.
            assert (batch["segment_ids"] == 0).all()
        np.testing.assert_array_equal(text[:, :-1], recorded_tokens)


def test_ranks_and_micro_batches_partition_the_same_order(tmp_path: Path) -> None:
    """At any (data ranks, micro batch) the union of step j is samples [j B, (j + 1) B)."""
    path = numbered(tmp_path / "numbers", 30)
    whole = reading(flat(train_data_paths=[path], valid_data_paths=[path], test_data_paths=[path]), 1)
    for size, micro, accumulation in ((2, 1, 2), (4, 1, 1), (2, 2, 1), (1, 1, 4)):
        args = flat(
            train_data_paths=[path],
            valid_data_paths=[path],
            test_data_paths=[path],
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=accumulation,
            global_num_gpus=size,
        )
        np.testing.assert_array_equal(reading(args, size), whole)


def reading(args: NeoXArgs, size: int) -> np.ndarray:
    """All train samples in global order, put together from every rank's micro batches."""
    streams = [build_data(args, streams=("text",), rank=rank, size=size).train.batches(stacked) for rank in range(size)]
    rounds = 6 * int(args.run.gradient_accumulation_steps or 1)
    return np.concatenate([next(stream)["text"] for _ in range(rounds) for stream in streams])  # type: ignore[index]


def test_resume_equals_uninterrupted_and_workers_change_nothing(tmp_path: Path) -> None:
    path = numbered(tmp_path / "numbers", 30)
    keys = {"train_data_paths": [path], "valid_data_paths": [path], "test_data_paths": [path]}
    plain = build_data(flat(**keys), streams=("text",)).train
    whole = [item["text"] for item in taken(plain, 12, 0)]
    for workers in (1, 3):
        train = build_data(flat(**keys, num_workers=workers), streams=("text",)).train
        for start in (0, 4, 8, 20):
            np.testing.assert_array_equal([item["text"] for item in taken(train, 12 - start // 2, start)], whole[start // 2 :])


def taken(split: DataSplit, count: int, start: int) -> list[Item]:
    batches = split.batches(stacked, start_sample=start)
    return [next(batches) for _ in range(count)]  # type: ignore[misc]


def test_the_end_of_training_data_is_an_error_and_validation_starts_over(tmp_path: Path) -> None:
    path = numbered(tmp_path / "numbers", 30)
    keys = {"train_data_paths": [path], "valid_data_paths": [path], "test_data_paths": [path]}
    data = build_data(flat(**keys, pack_impl="unpacked", eval_iters=1, eval_interval=100, num_workers=1), streams=("text",))
    assert (len(data.train), data.train_iters) == (25, 6)  # 24 needed, half a percent more, so 25 rows
    with pytest.raises(DataError, match="25 samples were built"):
        list(data.train.batches(stacked))
    assert data.valid is not None and data.test is not None
    length = len(data.valid)
    again = [item["text"][:, 0].tolist() for item in taken(data.valid, 4 * length, 0)]
    assert sum(again, [])[: 2 * length] == sum(again, [])[:length] * 2


def test_train_epochs_read_every_member_exactly_so_often(tmp_path: Path) -> None:
    """The reference read each member of a mixture until the longest was through; ours gives each its own number of epochs."""
    paths = [numbered(tmp_path / "a", 10, 0, length=16), numbered(tmp_path / "b", 40, 100, length=16)]
    args = flat(train_data_paths=paths, valid_data_paths=paths, test_data_paths=paths, train_iters=None, train_epochs=2)
    data = build_data(args, streams=("text",))
    # 320 and 1280 tokens are 19 and 79 rows, of which the last is never read.
    assert len(data.train) == 18 + 78 and data.train_iters == 24
    items = [data.train.dataset[i]["text"][0] for i in range(len(data.train))]
    assert sum(token < 100 for token in items) == 18


def test_a_share_of_data_path_stays_in_its_range(tmp_path: Path) -> None:
    """The reference's pack_until_overflow ignored the range: validation was served training documents."""
    path = numbered(tmp_path / "numbers", 20, length=7)
    for pack in ("packed", "pack_until_overflow", "unpacked"):
        data = build_data(flat(data_path=path, split="50,25,25", pack_impl=pack, eval_iters=2), streams=("text",))
        seen = {name: tokens(split) for name, split in (("train", data.train), ("valid", data.valid), ("test", data.test)) if split}
        assert seen == {"train": set(range(10)), "valid": set(range(10, 15)), "test": set(range(15, 20))}


def tokens(split: DataSplit) -> set[int]:
    length = min(len(split), 400)
    items = [split.dataset[i] for i in range(length)]
    return {int(token) for item in items for token in item["text"][item["label"] >= 0 if "label" in item else slice(None)]}


def test_paths_that_do_not_go_together(tmp_path: Path) -> None:
    path = numbered(tmp_path / "numbers", 10)
    with pytest.raises(DataError, match="does not exist") as missing:
        build_data(flat(data_path=str(tmp_path / "nmbers")), streams=("text",))
    assert "numbers" in str(missing.value.fix)
    with pytest.raises(ConfigError, match="holds one text"):
        build_data(flat(data_path=path), streams=("pos", "neg"))
    with pytest.raises(ConfigError, match="stream reward"):
        build_data(flat(train_data_paths=[path], valid_data_paths=[path], test_data_paths=[path]), streams=("text", "reward"))


def test_barrier_is_met_by_every_rank(tmp_path: Path) -> None:
    path = numbered(tmp_path / "numbers", 30)
    met: list[int] = []
    for rank in (0, 1):
        build_data(
            flat(data_path=path, global_num_gpus=2), streams=("text",), rank=rank, size=2, barrier=lambda rank=rank: met.append(rank)
        )
    with pytest.raises(DataError):
        build_data(flat(data_path="nowhere/at/all"), streams=("text",), rank=0, size=2, barrier=lambda: met.append(2))
    assert met == [0, 1, 2]


def test_pairs_with_rewards_and_reference_log_probs(tmp_path: Path) -> None:
    """Aligned streams of other kinds: padded with 0, a reward standing beside each token of its document."""
    path = numbered(tmp_path / "text", 9, length=12)
    with IndexedDatasetBuilder(tmp_path / "reward", np.int32) as reward, IndexedDatasetBuilder(tmp_path / "text_base", np.float32) as ref:
        for number in range(9):
            reward.add_document([number - 4])
            ref.add_document(np.full(12, -number / 2))
        reward.finalize()
        ref.finalize()
    keys: dict[str, Any] = {f"{name}_data_paths": [path] for name in ("train", "valid", "test")}
    keys |= {f"{name}_reward_data_paths": [str(tmp_path / "reward")] for name in ("train", "valid", "test")}
    args = flat(**keys, pack_impl="unpacked", precompute_model_name="base")
    data = build_data(args, streams=("text", "reward", "ref"))
    for i in range(9):
        item = data.train.dataset[i]
        number = int(item["text"][0])
        assert {name: item[name].dtype for name in ("text", "label", "reward", "ref")} == {
            "text": np.int64, "label": np.int64, "reward": np.float32, "ref": np.float32
        }  # fmt: skip
        assert item["reward"].tolist() == [number - 4] * 12 + [0] * 5
        assert item["ref"].tolist() == [-number / 2] * 12 + [0] * 5
        assert item["label"].tolist() == [number] * 12 + [-100] * 5
        assert item["segment_ids"].tolist() == [0] * 12 + [1] * 5
