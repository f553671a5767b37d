# SPDX-License-Identifier: Apache-2.0
"""Files made to run something when they are read: nothing runs, and one error names the file."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.errors import NeoXError
from support.jobs import Job, settings
from support.tree import ROOT

GOLDEN = ROOT / "tests" / "golden" / "train"
KINDS = ("zip", "legacy", "pickle", "in a numpy array", "as a numpy number", "as random state", "built", "TorchScript")


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


class HostileState(OrderedDict):  # type: ignore[type-arg]
    """A plain dictionary whose later state makes a folder."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"weight": Hostile(self.marker)}


class HostileNumber:
    """A numpy scalar of the object type, whose value is a hostile one."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return np.float64(0).__reduce__()[0], (np.dtype(object), Hostile(self.marker))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "made_by_the_file"


def write_hostile(path: Path, kind: str, marker: Path) -> None:
    """A file that makes `marker` if anything in it is run."""
    import torch

    bait = Hostile(marker)
    content: Any = {"module": {"sequential.0.word_embeddings.weight": torch.zeros(2, 2)}, "iteration": 8, "args": {}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({**content, "module": bait}))
    elif kind == "TorchScript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps(bait))
            archive.writestr("a/constants.pkl", pickle.dumps(bait))
            archive.writestr("a/version", "3\n")
    else:
        found = {
            "in a numpy array": np.array([bait], dtype=object),
            "as a numpy number": HostileNumber(marker),
            "as random state": ("MT19937", np.array([bait], dtype=object), 0, 0, 0.0),
            "built": HostileState(marker),
        }.get(kind, bait)
        content |= {"np_rng_state": found, "optimizer_state_dict": {"loss_scaler": found}}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")


def refused(action: Callable[[], object], path: Path, marker: Path) -> str:
    """The report of the one error that names the file; nothing has run."""
    with pytest.raises(NeoXError) as caught:
        action()
    assert not marker.exists()
    report = str(caught.value)
    assert str(path) in report and caught.value.fix and "arbitrary code" not in report, report
    return report


def test_the_bait_is_live(tmp_path: Path, marker: Path) -> None:
    """The files do run something where they are unpickled without care; otherwise these tests would show nothing."""
    import torch

    for kind in KINDS[:-1]:
        write_hostile(tmp_path / "a.pt", kind, marker)
        if kind == "pickle":
            pickle.loads((tmp_path / "a.pt").read_bytes())
        else:
            with suppress(TypeError):  # numpy refuses such a number, once its value has been made
                torch.load(tmp_path / "a.pt", weights_only=False)
        assert marker.is_dir(), kind
        marker.rmdir()


@pytest.mark.parametrize("kind", KINDS)
def test_no_reader_of_a_checkpoint_runs_it(tmp_path: Path, marker: Path, kind: str) -> None:
    """Bookkeeping, weights, DeepSpeed's own loading of optimizer shards, the inspector."""
    from megatron.checkpoint.conversion.inspect import TensorSelection, entries, locate
    from megatron.checkpoint.formats.neox_files import bookkeeping, read_weights
    from megatron.checkpoint.loading.merge_tp import read_shards
    from megatron.engine.deepspeed_runner import SafeCheckpointEngine

    folder = tmp_path / "global_step8"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        path = folder / name
        write_hostile(path, kind, marker)
        refused(lambda: list(entries(locate(folder), TensorSelection())), path, marker)
        refused(lambda path=path: SafeCheckpointEngine(None).load(str(path), map_location="cpu"), path, marker)
        if name.startswith("mp_rank"):
            refused(lambda: bookkeeping(folder, deepspeed_types=True), path, marker)
        if not name.startswith("bf16"):
            refused(lambda: read_weights(folder), path, marker)
            refused(lambda: list(read_shards(folder)), path, marker)
        path.unlink()


def test_a_run_takes_nothing_hostile_up(tmp_path: Path, marker: Path) -> None:
    """As a user sees it: exit status 77 (bad configuration or data) and a report that names the file."""
    save = tmp_path / "run"
    (save / "global_step8").mkdir(parents=True)
    (save / "latest").write_text("global_step8")
    path = save / "global_step8" / "mp_rank_00_model_states.pt"
    write_hostile(path, "zip", marker)
    job = Job(tmp_path, settings(tmp_path, train_iters=9))
    assert job.wait(100) == 77, job.output
    assert not marker.exists() and str(path) in job.output and "nothing in the file was executed" in job.output
    assert "Traceback" not in job.output


@pytest.mark.full
def test_deepspeed_reads_optimizer_shards_safely(tmp_path: Path, marker: Path) -> None:
    """A run's own checkpoint, in which one shard was replaced."""
    config = settings(tmp_path, train_iters=2, zero_optimization={"stage": 1})
    assert Job(tmp_path, config).wait(100) == 0
    (path,) = (tmp_path / "run" / "global_step2").glob("*optim_states.pt")
    write_hostile(path, "zip", marker)
    (path.parent / "MANIFEST.json").unlink(missing_ok=True)  # digests would refuse it before anybody reads it
    job = Job(tmp_path, config | {"train_iters": 4})
    assert job.wait(100) == 77, job.output
    assert not marker.exists() and str(path) in job.output


def test_folders_of_torch_distributed_are_not_opened(tmp_path: Path, marker: Path) -> None:
    """Their .metadata is a pickle that torch itself reads without care."""
    from megatron.checkpoint.conversion.inspect import locate

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    refused(lambda: locate(tmp_path), tmp_path / ".metadata", marker)


@pytest.mark.parametrize("size", [1, 200_000], ids=["read", "mapped"])
def test_arrays_of_objects_are_not_read(tmp_path: Path, marker: Path, size: int) -> None:
    """Index maps are made anew, and say so; tokens are refused."""
    from megatron.data.dataset_builder import cached_arrays, content_name
    from megatron.generation.modes import _tokens

    hostile = np.array([Hostile(marker)] * size, dtype=object)
    path = tmp_path / f"{content_name('train', {'seed': 1})}_a.npy"
    with path.open("wb") as file:
        np.save(file, hostile, allow_pickle=True)
    made = cached_arrays(tmp_path, "train", {"seed": 1}, ("a",), lambda: [np.arange(3)])
    assert made[0].tolist() == [0, 1, 2] and not marker.exists()
    np.save(tmp_path / "tokens.npy", hostile, allow_pickle=True)
    refused(lambda: _tokens(tmp_path / "tokens.npy", 512), tmp_path / "tokens.npy", marker)


def test_a_pickle_is_no_dataset(tmp_path: Path, marker: Path) -> None:
    """Neither as index nor as numpy file that is called one."""
    from megatron.data.indexed_dataset import IndexedDataset

    (tmp_path / "a.bin").write_bytes(b"\0" * 8)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Hostile(marker)], dtype=object), allow_pickle=True)
    for content in (pickle.dumps(Hostile(marker)), buffer.getvalue(), b"TNTIDX\0\0" + pickle.dumps(Hostile(marker))):
        (tmp_path / "a.idx").write_bytes(content)
        refused(lambda: IndexedDataset(tmp_path / "a"), tmp_path / "a.idx", marker)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [{}]", "!!python/name:os.mkdir {}"])
def test_a_configuration_cannot_call(tmp_path: Path, marker: Path, tag: str) -> None:
    """In a file, in a flag, in a plan of fault_injection."""
    import yaml

    from megatron import fault_injection
    from megatron.neox_arguments.yaml_loader import read_files, scalar

    text = tag.format(marker)
    path = tmp_path / "bad.yml"
    path.write_text(f"seed: 1\nsave: {text}\n")
    problems = read_files([str(path)]).problems
    assert len(problems) == 1 and str(path) in str(problems[0].where), problems
    assert isinstance(scalar(text), str)
    with pytest.raises(yaml.YAMLError):
        fault_injection._read(str(path))
    assert not marker.exists()


def test_tokenizer_files_bring_no_code(tmp_path: Path, marker: Path) -> None:
    """Pickles under the names of tokenizer files are refused; code that a Hugging Face folder names is not imported."""
    from megatron.tokenizer.registry import open_tokenizer
    from megatron.tokenizer.tokenizer import TokenizerKind, TokenizerSource

    bait = pickle.dumps(Hostile(marker))
    for kind, name in ((TokenizerKind.HF, "tokenizer.json"), (TokenizerKind.GPT2_BPE, "vocab.json"), (TokenizerKind.SPM, "a.model")):
        (tmp_path / name).write_bytes(bait)
        source = TokenizerSource(kind, str(tmp_path / name), str(tmp_path / name))
        refused(lambda source=source: open_tokenizer(source), tmp_path / name, marker)
    folder = tmp_path / "remote"
    shutil.copytree(ROOT / "tests" / "golden" / "tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}".replace(
        "MARKER", str(marker)
    )
    code = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "trust_remote_code": True, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | code))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Tokenizer: ...\n")
    tokenizer = open_tokenizer(TokenizerSource(TokenizerKind.HF, str(folder), None))
    assert tokenizer.decode(tokenizer.encode("plain text")) == "plain text" and not marker.exists()


def test_names_in_files_lead_nowhere_else(tmp_path: Path) -> None:
    """`latest`, manifests and the index of a Hugging Face folder name files beside them, or they are refused."""
    from megatron.checkpoint.formats.hf_files import INDEX, read_state
    from megatron.checkpoint.steps.discovery import Search, find
    from megatron.checkpoint.steps.manifest import Entry, Manifest, read_manifest, write_manifest
    from megatron.checkpoint.steps.step_dirs import find_tag

    save, evil = tmp_path / "run", tmp_path / "evil"
    save.mkdir()
    shutil.copytree(GOLDEN / "neox_pp0" / "ckpt" / "global_step0", evil)
    for name in ("../evil", "../run/../evil", str(evil), "..", "."):
        (save / "latest").write_text(name)
        for look in (lambda: find_tag(save), lambda: find(Search(directory=save)), lambda: find(Search(directory=save, own=True))):
            refused(look, save, tmp_path / "none")
    from safetensors.torch import save_file
    from torch import ones

    save_file({"w": ones(1)}, evil / "model.safetensors")
    for name in ("../evil/model.safetensors", str(evil / "model.safetensors")):
        (save / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
        refused(lambda: read_state(save), save / INDEX, tmp_path / "none")
        entry = {f"../evil/{name.rpartition('/')[2]}" if name.startswith("..") else name: Entry(1, "0")}
        plain: dict[str, Any] = {"samples": 0, "tokens": 0, "layout": {}, "config": {}, "data": {}}
        write_manifest(save, Manifest(step=1, run_id="", files=entry, code_version="", written="", **plain))
        refused(lambda: read_manifest(save), save / "MANIFEST.json", tmp_path / "none")
