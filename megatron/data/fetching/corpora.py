# SPDX-License-Identifier: Apache-2.0
"""Named corpora: where they are and how their documents are read. Knows no tokenizer."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.data.fetching.download import Remote, fetch
from megatron.data.making.inputs import KNOWN
from megatron.data.making.inputs import find as find_inputs
from megatron.data.making.sources import Files, MadeHere, Source
from megatron.errors import DataError

C4 = "https://huggingface.co/datasets/allenai/c4/resolve/main"


@dataclass(frozen=True)
class Corpus:
    """A corpus by name.

    local:      makes the documents on this machine, without any network
    urls:       files to download; empty where no public host is known
    vocab_size: size of the tokenizer trained on it when none is given; None = a tokenizer must be given
    """

    name: str
    about: str
    local: Callable[[], Iterator[str]] | None = None
    urls: tuple[Remote, ...] = ()
    vocab_size: int | None = None

    def source(self, folder: Path, *, again: bool = False) -> Source:
        """Its documents as records {"text": ...}, in a fixed order; files are kept in `folder`/raw, and files put there by hand are used.

        again: download anew. Raises DataError when there is nothing to read.
        """
        if self.local is not None:
            make = self.local
            return MadeHere(self.name, lambda: ({"text": text} for text in make()), version=platform.python_version())
        raw = folder / "raw"
        if self.urls:
            return Files(find_inputs([fetch(remote, raw, again=again) for remote in self.urls]), lenient=True)
        if not raw.is_dir() or not any(raw.iterdir()):
            raise DataError(
                f"{self.name} ({self.about}) has no public download known to this project",
                where=str(raw),
                mend=f"put its files there ({', '.join(KNOWN)}) and run this again, or use tools/datasets/preprocess_data.py",
            )
        return Files(find_inputs(raw), lenient=True)


def find(name: str) -> Corpus:
    """The corpus of that name. Raises DataError that lists the names."""
    for corpus in CORPORA:
        if corpus.name == name:
            return corpus
    raise DataError(f"there is no corpus {name!r}", where="dataset", mend=f"one of {', '.join(corpus.name for corpus in CORPORA)}")


# Folders of the standard library that are tests, packages of others, tables or generated.
_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "encodings",
        "ensurepip",
        "pydoc_data",
    }
)


def pydoc() -> Iterator[str]:
    """The help topics and the standard library's sources of the running Python: about 9 MB of English and code.

    One document per topic and per file. They are ordered by the hash of their name, so that any stretch of them
    (a validation split) is a fair sample, and a file added by another Python version moves no other.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python carries no pydoc_data", where=str(root), mend="use a complete Python (python.org, uv, pyenv)"
        ) from error
    named = {f"topics/{name}": text for name, text in topics.items()}
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if _wanted(path.relative_to(root))}
    for name in sorted([*named, *files], key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield named[name] if name in named else files[name].read_text(encoding="utf-8", errors="replace")


def _wanted(path: Path) -> bool:
    return not any(part in _SKIPPED or part.startswith("config-") for part in path.parts[:-1])


def _enwik8() -> Remote:
    return Remote("http://mattmahoney.net/dc/enwik8.zip", "enwik8.zip", size_bytes=36_445_475)


def _c4(folder: str, parts: int) -> tuple[Remote, ...]:
    names = [f"c4-train.{part:05d}-of-{parts:05d}.json.gz" for part in range(parts)]
    return tuple(Remote(f"{C4}/{folder}/{name}", name) for name in names)


CORPORA: tuple[Corpus, ...] = (
    Corpus("pydoc", "Python's own help topics and sources", local=pydoc, vocab_size=4096),
    Corpus("enwik8", "the first 100 MB of a Wikipedia dump", urls=(_enwik8(),)),
    Corpus("c4", "Colossal Clean Crawled Corpus, English", urls=_c4("en", 1024)),
    Corpus("c4_openwebtext", "C4, news-like pages", urls=_c4("realnewslike", 512)),
    Corpus("pile", "the Pile, deduplicated or not, as JSON lines"),
    Corpus("pile_subset", "a part of the Pile"),
    Corpus("enron", "Enron e-mails"),
    Corpus("github", "GitHub sources (Pile component)"),
    Corpus("arxiv", "arXiv sources (Pile component)"),
    Corpus("europarl", "European Parliament proceedings (Pile component)"),
    Corpus("freelaw", "FreeLaw opinions (Pile component)"),
    Corpus("nih", "NIH grant abstracts (Pile component)"),
    Corpus("pubmed", "PubMed Central articles (Pile component)"),
    Corpus("books1", "books (Pile-era collection)"),
    Corpus("books3", "books (withdrawn Pile component)"),
    Corpus("hackernews", "Hacker News comments (Pile component)"),
    Corpus("openwebtext2", "pages linked from Reddit (Pile component)"),
    Corpus("stackexchange", "StackExchange questions and answers (Pile component)"),
    Corpus("ubuntu_irc", "Ubuntu IRC logs (Pile component)"),
    Corpus("youtube_subtitles", "YouTube subtitles (Pile component)"),
)
