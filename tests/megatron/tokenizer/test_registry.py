# SPDX-License-Identifier: Apache-2.0
"""What runs a tokenizer, decided by its ids; and the libraries' threads, counted in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import awkward  # noqa: F401 - gigatoken imports it at its first batch: done once here, not in each test's process
import numpy as np
import pytest
from tokenizers import AddedToken

from megatron.errors import BackendError, DataError
from megatron.tokenizer import TokenizerBackend, TokenizerKind, TokenizerSource, open_tokenizer, select_backend
from megatron.tokenizer.gigatoken_backend import GigatokenTokenizer
from megatron.tokenizer.hugging_face import EngineTokenizer, open_hf
from megatron.tokenizer.registry import HARD_STRINGS, hard_strings
from tests.support.engines import GOLDEN, SUPPORTED, UNSUPPORTED, corpus

CODE = """
import os
from megatron.tokenizer import TokenizerBackend, TokenizerKind, TokenizerSource, open_tokenizer, set_library_threads
set_library_threads({number})

def threads():  # not those that other imports start, which have names of their own
    names = [open(f"/proc/self/task/{{thread}}/comm").read() for thread in os.listdir("/proc/self/task")]
    return names.count(open("/proc/self/comm").read())

tokenizer = open_tokenizer(TokenizerSource(TokenizerKind.HF, "tests/golden/tokenizer", backend=TokenizerBackend("{backend}")))
before = threads()
tokenizer.encode_ragged(["some words " * 5000] * {texts})
print(threads() - before)
"""


@pytest.mark.parametrize("backend", ["hf", "gigatoken"])
@pytest.mark.parametrize(("number", "more"), [(1, 0), (3, 3)])
def test_threads_are_as_many_as_asked(backend: str, number: int, more: int) -> None:
    code = CODE.format(number=number, backend=backend, texts=40 if backend == "gigatoken" else 4)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == more


AUTO, HF, GIGATOKEN = TokenizerBackend.AUTO, TokenizerBackend.HF, TokenizerBackend.GIGATOKEN


def source_of(path: Path, backend: TokenizerBackend) -> TokenizerSource:
    return TokenizerSource(TokenizerKind.HF, str(path), backend=backend)


def saved(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    eos = next(token["content"] for token in reversed(json.loads(content)["added_tokens"]) if token["special"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}), encoding="utf-8")
    return folder


def test_a_source_has_the_family_s_library_unless_told_otherwise() -> None:
    source = TokenizerSource(TokenizerKind.HF, str(GOLDEN))
    assert source.backend is HF and select_backend(source, corpus())[:2] == (source, "asked for")
    assert type(open_tokenizer(source)) is EngineTokenizer
    # What ids depend on does not include who made them: a run may go on with another backend.
    assert repr(source) == repr(replace(source, backend=GIGATOKEN)) and source != replace(source, backend=GIGATOKEN)
    with pytest.raises(ValueError, match="settled"):
        open_tokenizer(replace(source, backend=AUTO))


@pytest.mark.parametrize("kind", ["golden", "llama3", "llama2"])
def test_gigatoken_where_ids_are_equal(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / kind, SUPPORTED[kind]().to_str())
    settled = select_backend(source_of(path, AUTO), [*corpus()[:20], "not Unicode \ud800"])
    assert settled.source == source_of(path, GIGATOKEN) and "ids of" in settled.reason
    assert select_backend(source_of(path, GIGATOKEN), corpus()[:20]).source == settled.source
    fast = open_tokenizer(settled.source)
    assert isinstance(fast, GigatokenTokenizer)
    assert fast.encode_batch(corpus()) == open_hf(str(path)).encode_batch(corpus())


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_hf_where_gigatoken_cannot(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / kind, UNSUPPORTED[kind]().to_str())
    settled = select_backend(source_of(path, AUTO), corpus()[:3])
    assert settled.source == source_of(path, HF) and "Unsupported model type" in settled.reason and "\n" not in settled.reason
    for use in (select_backend, open_tokenizer):
        with pytest.raises(DataError, match="gigatoken cannot run this tokenizer: Unsupported"):
            use(source_of(path, GIGATOKEN))


def test_hf_where_a_token_has_to_be_a_whole_word(tmp_path: Path) -> None:
    engine = SUPPORTED["golden"]()
    engine.add_tokens([AddedToken("foo", single_word=True)])
    path = saved(tmp_path / "whole", engine.to_str())
    assert select_backend(source_of(path, AUTO)).reason == "gigatoken cannot run this tokenizer: 'foo' is a token only as a whole word"


def test_hf_for_the_other_families() -> None:
    source = TokenizerSource(TokenizerKind.CHAR_LEVEL, backend=AUTO)
    assert select_backend(source)[:2] == (replace(source, backend=HF), "gigatoken cannot run a CharLevelTokenizer")
    with pytest.raises(DataError, match="cannot run a CharLevelTokenizer"):
        select_backend(replace(source, backend=GIGATOKEN))


def test_hf_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.tokenizer.gigatoken_backend.find_spec", lambda name: None)
    assert select_backend(source_of(GOLDEN, AUTO))[:2] == (source_of(GOLDEN, HF), "the package gigatoken is not installed")
    with pytest.raises(BackendError, match="not installed"):
        select_backend(source_of(GOLDEN, GIGATOKEN))


def test_hf_where_the_package_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # type: ignore[arg-type]
    monkeypatch.setattr("megatron.tokenizer.gigatoken_backend.find_spec", lambda name: "there")
    assert "cannot run" in select_backend(source_of(GOLDEN, AUTO)).reason


@pytest.mark.parametrize("where", ["zebra crossing", "'ll", "caf\u00e9", "<|padding|>"])
def test_a_difference_decides(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """On a text of the run, a hard string, and a token of the vocabulary."""
    bare = GigatokenTokenizer._encode
    monkeypatch.setattr(GigatokenTokenizer, "_encode", lambda self, texts: bare(self, [text.replace(where, "?") for text in texts]))
    texts = [*corpus()[:5], "a zebra crossing"]
    settled = select_backend(source_of(GOLDEN, AUTO), texts)
    assert settled.source.backend is HF and "gigatoken differs: of " in settled.reason
    with pytest.raises(DataError, match="gigatoken differs: of .*`tokenizers` makes .* ids.*\n.*\n.*fix.*hf"):
        select_backend(source_of(GOLDEN, GIGATOKEN), texts)


def test_hard_strings_hold_what_tells_tokenizers_apart() -> None:
    engine = open_hf(str(GOLDEN))
    strings = hard_strings(engine)
    text = "".join(strings)
    assert set(HARD_STRINGS) < set(strings) and "" in strings and len(HARD_STRINGS) == len(set(HARD_STRINGS))
    assert {"\x00", "\r\n", "\u2028", "\ufeff", "\u0301", "\u200d", "\U0010fffd"} < set(text) | {"\r\n"}
    for token in ("<|endoftext|>", "<|padding|>"):
        assert {token, f"a{token}b", f"a {token} b", f" {token}", f"{token} "} <= set(strings)
    assert max(map(len, text.split())) > 2000


class Panic(BaseException):
    """Like the exception of a panic in Rust."""


def test_a_panic_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import gigatoken

    def panic(content: Any) -> Any:
        raise Panic("index out of bounds")

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", panic)
    assert select_backend(source_of(GOLDEN, AUTO)).reason.endswith("index out of bounds")
    ids = np.array(open_tokenizer(select_backend(source_of(GOLDEN, AUTO)).source).encode("a"))
    assert len(ids)
