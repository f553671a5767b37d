# SPDX-License-Identifier: Apache-2.0
"""The files that go with a model's weights: tokenizer, chat template, generation settings. Knows no tensor."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.conversion.model import ToHF
from megatron.checkpoint.formats.hf_files import read_json, write_json
from megatron.errors import ConfigError
from megatron.log import get_logger

log = get_logger(__name__)

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


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """generation_config.json from the special ids of config.json, where none was copied."""
    if not (folder / GENERATION).is_file():
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None}
        write_json(folder / GENERATION, {"_from_model_config": True, **ids})
