# SPDX-License-Identifier: Apache-2.0
"""The folder a conversion writes: aside until it is complete, with neox_config.yml, a record of every tensor, and the tokenizer's files."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron.atomic_io import new_digest
from megatron.checkpoint.conversion.model import ToHF
from megatron.checkpoint.formats.hf_files import read_json, write_json
from megatron.checkpoint.formats.torch_file import LazyState
from megatron.checkpoint.steps.step_dirs import publish
from megatron.errors import CheckpointError, ConfigError
from megatron.log import get_logger
from megatron.provenance import code_version

log = get_logger(__name__)

PARTIAL = ".partial"


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where something is at `out` that must not be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError("the output is not a folder", where=str(out), fix="choose another folder")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise CheckpointError("the output folder is not empty", where=str(out), fix="choose another folder, or give --overwrite")


@contextmanager
def written_aside(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Within, fill the folder `<out>.partial`, which then gets its name; after an error it is removed, and `out` is as it was.

    Raises CheckpointError where `out` holds something, unless `overwrite`.
    """
    check_free(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
    aside.mkdir()
    try:
        yield aside
        publish(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


NAME = "neox_config.yml"
USE = f"python deepy.py train.py {NAME} --data_path DATA --save FOLDER"

# A start for fine-tuning; everything that a run cannot do without is there.
TRAINING: dict[str, Any] = {
    "train_iters": 1000,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1.0e-5, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "lr_decay_style": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "checkpoint_factor": 1000,
    "eval_interval": 1000,
    "eval_iters": 10,
    "log_interval": 10,
}


def render(source: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """YAML with a heading over each section; tuples become lists.

    >>> print(render("a model", {"Model": {"num_layers": 2}}).splitlines()[-1])
    num_layers: 2
    """
    head = f"# SPDX-License-Identifier: Apache-2.0\n# Made of {source}.\n# Use: {USE}\n"
    texts = {title: "".join(f"{key}: {_value(value)}\n" for key, value in keys.items()) for title, keys in sections.items() if keys}
    return head + "".join(f"\n# {title}\n{text}" for title, text in texts.items())


def _value(value: Any) -> str:
    text: str = yaml.safe_dump(_plain(value), sort_keys=False, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


RECORD = "conversion.json"
EVERY_S = 10.0


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """As configuration files call it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


class ByteProgress:
    """How much of a known number of bytes is done: a bar on a terminal, a log line now and then elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, max(1, total), 0
        self._begun = self._told = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False)

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told > EVERY_S:
            self._told = time.monotonic()
            log.info("%s: %.1f of %.1f GB (%d %%)", self._title, self._done / 1e9, self._total / 1e9, 100 * self._done // self._total)

    def close(self) -> None:
        """The end, with the speed."""
        if self._bar is not None:
            self._bar.close()
        spent = max(1e-9, time.monotonic() - self._begun)
        log.info("%s: %.2f GB in %.1f s (%.0f MB/s)", self._title, self._done / 1e9, spent, self._done / 1e6 / spent)


class Table:
    """Name -> shape, dtype and XXH3-128 digest of each Hugging Face tensor that went through."""

    def __init__(self, progress: ByteProgress) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.progress = progress

    def add(self, name: str, tensor: Tensor) -> memoryview:
        """Note a tensor; returns its bytes."""
        content = content_of(tensor)
        digest = new_digest()
        digest.update(content)
        self.rows[name] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype), "xxh128": digest.hexdigest()}
        self.progress.add(len(content))
        return content

    def noting(self, source: Mapping[str, Tensor]) -> LazyState:
        """A lazy state whose tensors are noted when they are read for the first time."""

        def read(name: str) -> Tensor:
            tensor = source[name]
            if name not in self.rows:
                self.add(name, tensor)
            return tensor

        return LazyState({name: partial(read, name) for name in source})


def write_record(folder: Path, facts: Mapping[str, Any], table: Table) -> None:
    """conversion.json: what was made of what, when, by which code, and every tensor with its digest."""
    facts = {**facts, "code_version": code_version(), "converted_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_json(folder / RECORD, {**facts, "tensors": table.rows})


def read_record(folder: Path) -> dict[str, Any]:
    """The conversion.json of a folder; empty where there is none."""
    return read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy what is there of a tokenizer, its chat template and the generation settings; returns the names."""
    names = [name for name in (*TOKENIZER_FILES, GENERATION) if (source / name).is_file()]
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def tokenizer_keys(folder: Path, place: Path) -> dict[str, Any]:
    """Our keys for the tokenizer whose files are in `folder` now and at `place` later; empty where there is none."""
    if (folder / "tokenizer.json").is_file():
        return {"tokenizer_type": "HFTokenizer", "vocab_file": str(place / "tokenizer.json")}
    if (folder / "tokenizer.model").is_file():
        return {"tokenizer_type": "SPMTokenizer", "vocab_file": str(place / "tokenizer.model")}
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(place / "vocab.json"), "merge_file": str(place / "merges.txt")}
    return {}


def special_ids(tokenizer: Path) -> dict[str, int]:
    """bos_token_id and so on, as a folder's tokenizer_config.json and tokenizer.json give them."""
    if not ((tokenizer / "tokenizer_config.json").is_file() and (tokenizer / "tokenizer.json").is_file()):
        return {}
    config, whole = read_json(tokenizer / "tokenizer_config.json"), read_json(tokenizer / "tokenizer.json")
    ids = {one["content"]: one["id"] for one in whole.get("added_tokens") or []}
    found = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            found[f"{name}_id"] = ids[token]
    return found


def special_fields(source: Mapping[str, Any], vocab_file: Path | None, pad: int | None) -> dict[str, Any]:
    """Ids of special tokens for config.json: those of the model it was made of, else the tokenizer's; never the defaults of transformers.

    source: that model's config.json, where there was one
    """
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields: dict[str, Any] = {name: source[name] for name in ids if name in source}
    if not fields:
        fields = {"bos_token_id": None, "eos_token_id": None, **({} if vocab_file is None else special_ids(vocab_file.parent))}
    return fields if pad is None else {**fields, "pad_token_id": pad}


def find_tokenizer(request: ToHF, kind: str | None, vocab_file: str | None) -> Path | None:
    """The tokenizer.json to be written beside the weights; None, with a warning, where there is none to be found.

    kind, vocab_file: what the configuration says, looked for from here and from its files
    """
    folder = request.tokenizer_folder
    if not request.tokenizer:
        return None
    if folder is not None:
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError("no tokenizer.json is there", where=str(folder), fix="name the folder of a Hugging Face tokenizer")
        return folder / "tokenizer.json"
    if kind != "HFTokenizer" or not vocab_file:
        log.warning("tokenizer_type is %s: no tokenizer is written", kind)
        return None
    for place in (Path(vocab_file), *(config.parent / vocab_file for config in request.configs)):
        found = place / "tokenizer.json" if place.is_dir() else place
        if found.is_file():
            return found
    log.warning("vocab_file %s is not there: no tokenizer is written", vocab_file)
    return None


def save_tokenizer(vocab_file: Path, target: Path) -> None:
    """The tokenizer of a `vocab_file` as transformers opens it: its folder's files, or those made from a lone tokenizer.json."""
    if (vocab_file.parent / "tokenizer_config.json").is_file() and vocab_file.name == "tokenizer.json":
        copy_tokenizer(vocab_file.parent, target)
        return
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(vocab_file)).save_pretrained(target)


def add_tokenizer(folder: Path, vocab_file: Path | None, special: Mapping[str, Any] | None) -> None:
    """What goes with a model's weights: its tokenizer, and generation_config.json where none was copied.

    special: ids of special tokens, as in config.json; None for a model that generates nothing
    """
    if vocab_file is not None:
        save_tokenizer(vocab_file, folder)
    if special is not None and not (folder / GENERATION).is_file():
        ids = {name: special[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if special.get(name) is not None}
        write_json(folder / GENERATION, {"_from_model_config": True, **ids})
