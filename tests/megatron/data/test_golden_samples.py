# SPDX-License-Identifier: Apache-2.0
"""Sample order and content against recordings of the reference: token for token, except where its own defects are named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.blend import by_num_documents, normalise, samples_per_member, split_bounds
from megatron.data.dataset_builder import Amount, Recipe, open_dataset, open_mixture
from megatron.data.streams import StreamDataset

GOLDEN = Path(__file__).parents[2] / "golden" / "samples"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
PREFIXES = {
    "data_prefix": "text",
    "label_prefix": "label",
    "reward_prefix": "reward",
    "pos_data_prefix": "pos",
    "neg_data_prefix": "neg",
    "pos_label_prefix": "pos_label",
    "neg_label_prefix": "neg_label",
}


def opened(case: str, maps: Path) -> StreamDataset:
    """Our dataset for a recorded case."""
    args = MANIFEST[case]["args"]
    paths = {PREFIXES[key]: str(GOLDEN / path) for key, path in args.items() if key in PREFIXES and path}
    recipe = Recipe(
        seq_length=args["seq_length"], seed=args["seed"], pack=args["pack_impl"], allow_chopped=args["allow_chopped"], map_dir=str(maps)
    )
    return open_dataset(args["name"], paths, recipe, Amount(samples=args.get("num_samples"), epochs=args.get("num_epochs")))


def recording(case: str) -> dict[str, np.ndarray]:
    """Its arrays: `text`, ..., and the index maps."""
    return dict(np.load(GOLDEN / f"{case}.npz"))


def without_leak(recorded: np.ndarray, ours: StreamDataset, main: str, sample: int, padding: int) -> np.ndarray:
    """A recorded row without the first token of the next document, which the reference appends after a row of whole documents."""
    row = recorded.copy()
    pieces = ours.pieces(int(ours.index.shuffle[sample]))
    end = sum(len(ours.streams[main].get(document)) for document, _, _ in pieces)
    row[end:] = padding
    return row


@pytest.mark.parametrize("case", ["packed", "packed_epochs1", "packed_epochs3", "packed_label"])
def test_packed_equals_the_recording(case: str, tmp_path: Path) -> None:
    ours, recorded = opened(case, tmp_path), recording(case)
    assert len(ours) == MANIFEST[case]["len"]
    for array, name, dtype in zip(ours.index[:3], ("doc_idx", "sample_idx", "shuffle_idx"), MANIFEST[case]["index_dtypes"], strict=True):
        np.testing.assert_array_equal(array, recorded[name])
        assert array.dtype == dtype
    for stream in ours.streams:
        rows = np.stack([ours[i][stream] for i in range(32)])
        np.testing.assert_array_equal(rows, recorded[stream])
        assert hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest() == MANIFEST[case]["arrays"][stream]["sha256_int64"]


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_split_equals_the_recording(name: str, tmp_path: Path) -> None:
    bounds = split_bounds("80,15,5", 297)
    number = ("train", "valid", "test").index(name)
    recipe = Recipe(seq_length=64, seed=1234, map_dir=str(tmp_path))
    paths = {"text": str(GOLDEN / "data" / "corpus")}
    ours = open_dataset(name, paths, recipe, Amount(samples=8), documents=(bounds[number], bounds[number + 1]))
    recorded = np.load(GOLDEN / f"split801505_{name}.npz")
    assert len(ours) == MANIFEST[f"split801505_{name}"]["len"]
    for array, key in zip(ours.index[:3], ("doc_idx", "sample_idx", "shuffle_idx"), strict=True):
        np.testing.assert_array_equal(array, recorded[key])
    np.testing.assert_array_equal(np.stack([ours[i]["text"] for i in range(8)]), recorded["text"])


@pytest.mark.parametrize(
    "case",
    ["unpacked_label", "unpacked_label_nochop", "unpacked_label_reward", "overflow_label", "pairwise_unpacked", "pairwise_overflow"],
)
def test_rows_of_whole_documents_equal_the_recording_without_its_leak(case: str, tmp_path: Path) -> None:
    """The reference appends the first token of the next document to each row. Ours does not; all else is equal."""
    ours, recorded = opened(case, tmp_path), recording(case)
    # All 200 that were asked for; the reference never used the last.
    assert len(ours) == 200 == MANIFEST[case]["len"] + 1
    for array, key in zip(ours.index[:3], ("doc_idx", "sample_idx", "shuffle_idx"), strict=True):
        np.testing.assert_array_equal(array, recorded[key])
    leaks = 0
    for i in range(32):
        item = ours[i]
        for stream in ours.streams:
            main = stream.split("_")[0] if stream.split("_")[0] in ("pos", "neg") else "text"
            expected = without_leak(recorded[stream][i], ours, main, i, -100 if stream.endswith("label") else 0)
            np.testing.assert_array_equal(item[stream], expected)
            leaks += int((recorded[stream][i] != expected).sum())
    assert leaks <= 32 * len(ours.streams)


def test_pairs_without_labels_do_not_take_over_the_map_of_labelled_pairs(tmp_path: Path) -> None:
    """The reference read the stale map of `pairwise_unpacked` here (same file name); ours reads every pair, in the same shuffle."""
    ours, recorded = opened("pairwise_unpacked_nolabel", tmp_path), recording("pairwise_unpacked_nolabel")
    np.testing.assert_array_equal(ours.index.documents, np.arange(201) % 50)
    np.testing.assert_array_equal(ours.index.shuffle, recorded["shuffle_idx"])
    for i in range(0, 199, 11):
        filled = min(int(ours.streams["neg"].sizes[ours.index.shuffle[i] % 50]), 65)
        expected = np.where(np.arange(65) < filled, ours[i]["neg"], -100)
        np.testing.assert_array_equal(ours[i]["neg_label"], expected)


@pytest.mark.parametrize("case", ["overflow_nochop", "overflow_label_nochop", "unpacked_nolabel"])
def test_cases_in_which_the_reference_fails(case: str, tmp_path: Path) -> None:
    """Recorded as IndexError and AttributeError; ours gives rows of whole documents that fit."""
    ours = opened(case, tmp_path)
    args = MANIFEST[case]["args"]
    text, s = ours.streams["text"], args["seq_length"]
    assert len(ours.index.shuffle) == 200
    for i in range(0, 199, 7):
        documents = [document for document, _, _ in ours.pieces(int(ours.index.shuffle[i]))]
        whole = np.concatenate([text.get(document) for document in documents])
        assert args["allow_chopped"] or len(whole) <= s + 1
        kept = whole[: s + 1]
        np.testing.assert_array_equal(ours[i]["text"], np.pad(kept, (0, s + 1 - len(kept))))
        assert (ours[i]["label"] >= 0).sum() > 0


@pytest.mark.parametrize("case", ["blend_70_30", "blend_default_weights", "blend_by_num_docs", "blend_label"])
def test_blends_equal_the_recording(case: str, tmp_path: Path) -> None:
    recorded, about = np.load(GOLDEN / f"{case}.npz"), MANIFEST[case]
    members: list[dict[str, str | None]] = [{"text": str(GOLDEN / path)} for path in about["paths"]]
    if "label" in recorded:
        members = [{**member, "label": f"{member['text']}_label"} for member in members]
    weights = normalise(about["weights"] or [1.0] * len(members))
    if about["extra"].get("weight_by_num_documents"):
        weights = by_num_documents([297, 60], about["extra"]["weighted_sampler_alpha"])
    ours = open_mixture("train", members, weights, Recipe(seq_length=64, seed=1234, map_dir=str(tmp_path)), num_samples=200)
    # Its length was the sum of its members' lengths, small members starting over unnoticed; ours is what was asked for.
    assert len(ours) == 200
    np.testing.assert_array_equal(ours._members, recorded["dataset_index"][:200])
    np.testing.assert_array_equal(ours._ranks, recorded["dataset_sample_index"][:200])
    assert [len(member) for member in ours.datasets] == about["member_lens"]
    for stream in ("text", "label"):
        if stream in recorded:
            np.testing.assert_array_equal(np.stack([ours[i][stream] for i in range(32)]), recorded[stream])
    np.testing.assert_array_equal(np.stack([ours[i]["text"] for i in range(16)]).reshape(8, 2, 65), recorded["loader_batches"])


def test_recorded_laws() -> None:
    for split in ("969,30,1", "90/5/5", "100"):
        for count, bounds in MANIFEST[f"split_{split}"]["sizes"].items():
            assert split_bounds(split, int(count)) == bounds
    for law, vectors in MANIFEST["weights_by_num_docs"].items():
        for counts, weights in vectors:
            assert by_num_documents(counts, float(law.split("=")[1])) == pytest.approx(weights, rel=1e-12)
    for weights, wanted, (normal, samples) in MANIFEST["normalized_weights_num_samples"]:
        assert normalise(weights) == pytest.approx(normal, rel=1e-15)
        assert samples_per_member(normalise(weights), wanted) == samples
