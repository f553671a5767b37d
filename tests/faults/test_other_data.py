# SPDX-License-Identifier: Apache-2.0
"""F26: the data of a run is changed, shortened, reordered or swapped between a checkpoint and the resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.errors import DataError, NeoXError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train"
CORPUS, OTHER = "corpus_text_document", "chat_document"

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(autouse=True)
def _in_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)


def run(tmp_path: Path, folder: Path, names: list[str] | None = None, **changes: Any) -> Any:
    """Train the tiny recorded configuration on the files in `folder`, in this process."""
    from megatron.neox_arguments import NeoXArgs
    from megatron.training import pretrain

    save = str(tmp_path / "run")
    values = {
        "train_data_paths": [str(folder / name) for name in names or [CORPUS, OTHER]],
        "valid_data_paths": [str(folder / CORPUS)],
        "index_map_dir": str(tmp_path / "maps"),
        "save": save,
        "load": save,
        "extra_save_iters": None,
        "checkpoint_factor": 100,
        "eval_iters": 0,
        "log_dir": None,
        "lr_decay_iters": 8,
    }
    return pretrain(NeoXArgs.from_ymls([str(GOLDEN / "neox_pp0" / "config.yml")], overwrites={**values, **changes}))


def flip(folder: Path) -> None:
    content = bytearray((folder / f"{CORPUS}.bin").read_bytes())
    content[1000] ^= 1
    (folder / f"{CORPUS}.bin").write_bytes(content)


def rewrite(folder: Path, order: Callable[[list[Any]], list[Any]]) -> None:
    """The documents of the corpus in another order, or fewer of them."""
    from megatron.data.indexed_dataset import IndexedDataset
    from tests.support.indexed import IndexedDatasetBuilder

    dataset = IndexedDataset(str(folder / CORPUS))
    documents = [np.array(dataset[number]) for number in range(len(dataset))]
    aside = folder / "aside"
    with IndexedDatasetBuilder(str(aside), dataset.dtype) as builder:
        for document in order(documents):
            builder.add_document(document)
        builder.finalize()
    for kind in ("bin", "idx"):
        (folder / f"aside.{kind}").replace(folder / f"{CORPUS}.{kind}")


def test_other_data_is_found_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    shutil.copytree(GOLDEN / "data", home)
    run(tmp_path, home, train_iters=1)
    # The same files elsewhere are the same data.
    away = tmp_path / "away"
    shutil.copytree(home, away)
    run(tmp_path, away, train_iters=2)
    cases: list[tuple[Callable[[Path], None], dict[str, Any], str]] = [
        (flip, {}, rf"train_data_paths\[0\]: {CORPUS}.bin has another content"),
        (lambda folder: rewrite(folder, lambda documents: documents[:-3]), {}, rf"{CORPUS}.bin is .* bytes long, and was"),
        (lambda folder: rewrite(folder, lambda documents: documents[::-1]), {}, rf"{CORPUS}.bin has another content"),
        (lambda folder: None, {"names": [OTHER, CORPUS]}, "the files are in another order"),
        (lambda folder: None, {"names": [CORPUS]}, f"{CORPUS}, {OTHER} in the checkpoint, {CORPUS} now"),
        (lambda folder: None, {"train_data_weights": [1.0, 2.0]}, r"train_data_weights: \[0.5, 0.5\] in the checkpoint"),
        (lambda folder: None, {"seed": 4321}, "seed: 1234 in the checkpoint, 4321 now"),
    ]
    for number, (change, settings, said) in enumerate(cases):
        folder = tmp_path / f"case{number}"
        shutil.copytree(home, folder)
        change(folder)
        with pytest.raises(DataError, match=said) as caught:
            run(tmp_path, folder, train_iters=3, **settings)
        assert "allow_data_change: true" in caught.value.report()
    capsys.readouterr()
    flip(away)
    state = run(tmp_path, away, train_iters=3, allow_data_change=True)
    assert state.iteration == 3 and state.samples == 12
    assert f"{CORPUS}.bin has another content" in capsys.readouterr().out
    # From here on, this is the run's data.
    run(tmp_path, away, train_iters=4)
    # New weights from old ones may learn from anything.
    run(tmp_path, home, ["chat_document"], train_iters=1, finetune=True, save=None)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    from megatron.data.fingerprint import fingerprint

    with pytest.raises(NeoXError, match="cannot be read"):
        fingerprint({"train": {"train_data_paths": [str(tmp_path / "gone")]}}, {})


def test_large_files_are_known_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method is part of the record; the first and the last byte are always seen."""
    from megatron.data import fingerprint as room

    monkeypatch.setattr(room, "WHOLE", 1 << 16)
    for kind in ("bin", "idx"):
        (tmp_path / f"large.{kind}").write_bytes(bytes(range(256)) * (1 << 16))
    lists = {"train": {"train_data_paths": [str(tmp_path / "large")]}}
    before = room.fingerprint(lists, {})
    assert before["files"]["train"]["train_data_paths"][0]["bin"]["digest"].startswith("sha256-of-66x65536:")
    for place in (0, -1):
        content = bytearray((tmp_path / "large.bin").read_bytes())
        content[place] ^= 1
        (tmp_path / "large.bin").write_bytes(content)
        now = room.fingerprint(lists, {})
        assert room.differences(before, now) == ["train_data_paths[0]: large.bin has another content"]
        before = now
