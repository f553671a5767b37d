# SPDX-License-Identifier: Apache-2.0
"""Index maps on disk: found again, never stale, built by two processes at once; and streams that do not fit each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.dataset_builder import Amount, Recipe, open_dataset, open_mixture, open_streams
from megatron.errors import DataError
from tests.support.indexed import IndexedDatasetBuilder

ROOT = Path(__file__).parents[3]
RECIPE = Recipe(seq_length=8, seed=1)


def write(prefix: Path, lengths: list[int], fill: int = 0, dtype: type = np.int32) -> str:
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for number, length in enumerate(lengths):
            builder.add_document([fill or number] * length)
        builder.finalize()
    return str(prefix)


def maps(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*indexmap*")}


def test_a_map_is_found_again_and_changed_inputs_make_another(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [5, 9, 20])
    first = open_dataset("train", {"text": path}, RECIPE, Amount(samples=3))
    known = maps(tmp_path)
    assert len(known) == 3 and not list(tmp_path.glob("*.tmp*"))
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in known}
    again = open_dataset("train", {"text": path}, RECIPE, Amount(samples=2))
    assert maps(tmp_path) == known and {name: (tmp_path / name).stat().st_mtime_ns for name in known} == stamps
    assert [again[i]["text"].tolist() for i in range(3)] == [first[i]["text"].tolist() for i in range(3)]
    changed = [
        (RECIPE, Amount(samples=9), (0, 3)),
        (RECIPE, Amount(samples=2), (1, 3)),
        (Recipe(seq_length=7, seed=1), Amount(samples=2), (0, 3)),
        (Recipe(seq_length=8, seed=2), Amount(samples=2), (0, 3)),
        (Recipe(seq_length=8, seed=1, pack="unpacked"), Amount(samples=2), (0, 3)),
        (Recipe(seq_length=8, seed=1, pack="unpacked", allow_chopped=False), Amount(samples=2), (0, 3)),
    ]
    for recipe, amount, documents in changed:
        before = maps(tmp_path)
        open_dataset("train", {"text": path}, recipe, amount, documents=documents)
        assert len(maps(tmp_path)) == len(before) + 3
    write(tmp_path / "x", [9, 5, 20])
    before = maps(tmp_path)
    renewed = open_dataset("train", {"text": path}, RECIPE, Amount(samples=3))
    assert len(maps(tmp_path)) == len(before) + 3
    assert renewed.index.samples.tolist() != first.index.samples.tolist()


def test_nothing_is_asked_for_and_large_maps_are_mapped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x", [5, 9, 20])
    for pack in ("packed", "unpacked", "pack_until_overflow"):
        recipe = Recipe(seq_length=8, seed=1, pack=pack)
        for _ in range(2):
            empty = open_mixture("train", [{"text": path}, {"text": path}], [0.5, 0.5], recipe, num_samples=0)
            assert len(empty) == 0
    assert "cannot be read" not in caplog.text
    recipe = Recipe(seq_length=8, seed=1, pack="unpacked")
    built, mapped = (open_dataset("train", {"text": path}, recipe, Amount(samples=200_000)) for _ in range(2))
    assert isinstance(mapped.index.shuffle.base, np.memmap)
    for i in range(0, 200_000, 9_999):
        np.testing.assert_array_equal(built[i]["text"], mapped[i]["text"])


def test_labels_of_the_same_lengths_make_another_map(tmp_path: Path) -> None:
    text, label = write(tmp_path / "x", [6, 7]), write(tmp_path / "y", [6, 7], fill=3)
    recipe = Recipe(seq_length=8, seed=1, pack="unpacked")
    assert set(open_dataset("train", {"text": text, "label": label}, recipe, Amount(samples=4)).index.documents.tolist()) == {0, 1}
    with IndexedDatasetBuilder(label, np.int32) as builder:
        builder.add_document([-100] * 6)
        builder.add_document([3] * 7)
        builder.finalize()
    assert set(open_dataset("train", {"text": text, "label": label}, recipe, Amount(samples=4)).index.documents.tolist()) == {1}


def test_a_damaged_map_is_built_again_and_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [5, 9, 20])
    first = open_dataset("train", {"text": path}, RECIPE, Amount(samples=3))
    expected = [first[i]["text"].tolist() for i in range(3)]
    for name in maps(tmp_path):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:90])
    again = open_dataset("train", {"text": path}, RECIPE, Amount(samples=3))
    assert [again[i]["text"].tolist() for i in range(3)] == expected
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written") as error:
        open_dataset("train", {"text": path}, Recipe(seq_length=8, seed=1, map_dir=str(tmp_path / "file")), Amount(samples=3))
    assert "index_map_dir" in str(error.value.fix)


def test_two_processes_build_the_same_map(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [5, 9, 20] * 2000)
    code = (
        "import sys, hashlib\n"
        "from megatron.data.dataset_builder import Amount, Recipe, open_dataset\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "d = open_dataset('train', {'text': sys.argv[1]}, Recipe(seq_length=8, seed=1, map_dir=sys.argv[2]), Amount(samples=30000))\n"
        "print(hashlib.sha256(b''.join(d[i]['text'].tobytes() for i in range(500))).hexdigest())\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, path, str(tmp_path / "maps")]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) for _ in range(2)]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        said = [process.communicate("\n", timeout=60)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert said[0] == said[1] and len(said[0]) == 65
    assert len(list((tmp_path / "maps").iterdir())) == 3


def test_streams_that_do_not_fit_are_named(tmp_path: Path) -> None:
    text = write(tmp_path / "text", [5, 6])
    cases = {
        "1 documents beside 2": {"text": text, "label": write(tmp_path / "a", [5])},
        "document 1 has 7 values beside 6": {"text": text, "label": write(tmp_path / "b", [5, 7])},
        "one number for a document": {"text": text, "reward": write(tmp_path / "c", [1, 2])},
        "not token ids": {"text": write(tmp_path / "d", [5], dtype=np.float32)},
        "stream neg does not fit": {"pos": text, "neg": write(tmp_path / "e", [5, 6, 7])},
        "not known": {"text": text, "lable": text},
    }
    for message, paths in cases.items():
        with pytest.raises(DataError, match=message):
            open_streams(paths)
    # Halves of pairs may differ in length; without a label file in a mixture with labels, every token is trained.
    halves = open_streams({"pos": text, "neg": write(tmp_path / "f", [3, 9])})
    assert list(halves) == ["pos", "neg"]
    dataset = open_dataset("train", {"text": text, "label": None}, RECIPE, Amount(samples=1))
    np.testing.assert_array_equal(dataset[0]["label"], dataset[0]["text"])


def test_packed_segments_count_the_documents_of_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [3, 4, 5, 30])
    dataset = open_dataset("train", {"text": path}, RECIPE, Amount(samples=4))
    for i in range(len(dataset)):
        text, segment_ids = dataset[i]["text"], dataset[i]["segment_ids"]
        changes = np.flatnonzero(np.diff(text)) + 1
        np.testing.assert_array_equal(segment_ids, np.searchsorted(changes, np.arange(9), side="right"))
