# SPDX-License-Identifier: Apache-2.0
"""The .bin/.idx format: its bytes, round trips, merging, and what damaged files say."""

from __future__ import annotations

import gc
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.indexed_dataset import DTYPES, IndexedDataset, best_dtype, data_file, exists, index_file, infer_impl
from megatron.errors import DataError
from tests.support.indexed import IndexedDatasetBuilder

SHARED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(prefix: Path, documents: list[list[int]], dtype: object = np.uint16) -> Path:
    with IndexedDatasetBuilder(prefix, dtype) as builder:  # type: ignore[arg-type]
        for document in documents:
            builder.add_document(document)
        builder.finalize()
    return prefix


def test_bytes_of_the_verified_sample(tmp_path: Path) -> None:
    """Three documents 0,1 / 0,1,2 / 0,1,2,3 in uint16: sizes 2 3 4, offsets 0 4 10, marks 0 1 2 3, an index of 102 bytes."""
    prefix = write(tmp_path / "x", [[0, 1], [0, 1, 2], [0, 1, 2, 3]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i3q4q", 2, 3, 4, 0, 4, 10, 0, 1, 2, 3)
    assert index_file(prefix).read_bytes() == expected and len(expected) == 102
    assert data_file(prefix).read_bytes() == struct.pack("<9H", 0, 1, 0, 1, 2, 0, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@SHARED
@given(documents=st.lists(st.lists(st.integers(0, 100), max_size=9), max_size=9), code=st.sampled_from(sorted(DTYPES)))
def test_round_trip_and_merge(tmp_path: Path, documents: list[list[int]], code: int) -> None:
    dtype = DTYPES[code]
    prefix = write(tmp_path / "x", documents, dtype)
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == dtype and [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.num_tokens == sum(map(len, documents))
    with IndexedDatasetBuilder(tmp_path / "twice", np.float64 if dtype.kind == "f" else np.int64) as builder:
        builder.merge(prefix)
        builder.merge(prefix)
        builder.finalize()
    twice = IndexedDataset(tmp_path / "twice")
    assert [document.tolist() for document in twice] == documents * 2
    assert twice.doc_idx.tolist() == list(range(2 * len(documents) + 1))


def test_views_outlive_the_dataset_and_datasets_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", [[1, 2, 3], [], [4]]), warmup=True)
    view, copy = dataset.get(0, 1), pickle.loads(pickle.dumps(dataset))
    assert dataset.get(0, 1, 1).tolist() == [2] and dataset[1].size == 0
    with pytest.raises(DataError, match="which has 3"):
        dataset.get(0, 2, 2)
    del dataset
    gc.collect()
    assert view.tolist() == [2, 3] and copy[2].tolist() == [4]


def test_values_that_do_not_fit_are_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    assert best_dtype(65499) == np.uint16 and best_dtype(65500) == best_dtype(None) == np.int32
    for wrong in ([70000], [-100], [0.5]):
        with pytest.raises(DataError, match="do not fit"), IndexedDatasetBuilder(tmp_path / "x", np.uint16) as builder:
            builder.add_document(wrong)
    with pytest.raises(DataError, match="no code"):
        IndexedDatasetBuilder(tmp_path / "x", np.uint32)
    assert list(tmp_path.iterdir()) == [] and not exists(tmp_path / "x")


def test_damaged_files_name_the_file_and_the_fix(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3], [4]])
    index, data = index_file(prefix).read_bytes(), data_file(prefix).read_bytes()
    assert infer_impl(prefix) == "mmap"
    damaged = {
        "less than its header": (index[:20], data),
        "header promises": (index[:-4], data),
        "version 2": (index[:9] + struct.pack("<Q", 2) + index[17:], data),
        "dtype code 9": (index[:17] + b"\x09" + index[18:], data),
        "begins with": (b"garbage" + index[7:], data),
        "legacy": (b"TNTIDX\x00\x00" + index[8:], data),
        "data file has 6 bytes, its index promises 8": (index, data[:-2]),
        "data file has 10 bytes": (index, data + b"\x00\x00"),
        "negative size": (index[:34] + struct.pack("<2i", -1, 5) + index[42:], data),
        "offsets": (index[:50] + struct.pack("<q", 2) + index[58:], data),
    }
    for message, (bad_index, bad_data) in damaged.items():
        index_file(prefix).write_bytes(bad_index)
        data_file(prefix).write_bytes(bad_data)
        with pytest.raises(DataError, match=message) as error:
            IndexedDataset(prefix)
        assert str(tmp_path / "x.") in str(error.value.where) and error.value.fix
    data_file(prefix).unlink()
    with pytest.raises(DataError, match="does not exist"):
        IndexedDataset(prefix)
    with pytest.raises(DataError, match="does not exist") as error:
        IndexedDataset(f"{prefix}.bin")
    assert "without .bin" in str(error.value.fix)


def test_an_old_merge_without_document_marks_is_repaired(tmp_path: Path) -> None:
    """A library of old wrote [0] for the marks of merged files; merging such a file counts its sequences."""
    prefix = write(tmp_path / "x", [[1], [2]])
    index = index_file(prefix).read_bytes()
    index_file(prefix).write_bytes(index[:26] + struct.pack("<Q", 1) + index[34:-16])
    with IndexedDatasetBuilder(tmp_path / "y", np.uint16) as builder:
        builder.merge(prefix)
        builder.finalize()
    assert IndexedDataset(tmp_path / "y").doc_idx.tolist() == [0, 1, 2]
