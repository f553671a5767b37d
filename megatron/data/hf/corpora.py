# SPDX-License-Identifier: Apache-2.0
"""Named corpora: where they are and how their documents are read."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.hf.download import Remote, fetch
from megatron.data.hf.hub import find as find_on_hub
from megatron.data.hf.request import Data
from megatron.data.preprocess.blocks import RecordSource
from megatron.data.preprocess.inputs import KNOWN
from megatron.data.preprocess.inputs import find as find_inputs
from megatron.data.preprocess.sources import Files, MadeHere
from megatron.errors import DataError

C4 = "https://huggingface.co/datasets/allenai/c4/resolve/main"
ENWIK8 = "http://mattmahoney.net/dc"
PILE = "https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main/train"
PILE_SHARDS = 30
GONE = "component of the Pile whose host is gone"


@dataclass(frozen=True)
class Corpus:
    """A corpus by name.

    local:      makes the documents on this machine, without any network
    urls:       files to download; hub: a dataset of the Hugging Face Hub with a column `text`. Neither: no public host is known
    vocab_size: size of the tokenizer trained on it when none is given; None = a tokenizer must be given
    """

    name: str
    about: str
    local: Callable[[], Iterator[str]] | None = None
    urls: tuple[Remote, ...] = ()
    hub: str | None = None
    vocab_size: int | None = None

    def source(self, folder: Path, *, again: bool = False) -> RecordSource:
        """Its documents as records {"text": ...}, in a fixed order; files are kept in `folder`/raw, and files put there by hand are used.

        again: download anew. Raises DataError when there is nothing to read.
        """
        if self.local is not None:
            make = self.local
            return MadeHere(self.name, lambda: ({"text": text} for text in make()), version=platform.python_version())
        raw = folder / "raw"
        if self.urls:
            return Files(find_inputs([fetch(remote, raw, again=again) for remote in self.urls]), lenient=True)
        if raw.is_dir() and any(raw.iterdir()):
            return Files(find_inputs(raw), lenient=True)
        if self.hub is not None:
            return find_on_hub(Data(dataset=self.hub), columns=("text",))
        raise DataError(
            f"{self.name} ({self.about}) has no public download known to this project",
            where=str(raw),
            fix=f"put its files there ({', '.join(KNOWN)}) and run this again, or use tools/datasets/preprocess_data.py",
        )


def find(name: str) -> Corpus:
    """The corpus of that name. Raises DataError that lists the names."""
    known = {corpus.name: corpus for corpus in CORPORA}
    if name not in known:
        raise DataError(f"there is no corpus {name!r}", where="dataset", fix=f"one of {', '.join(known)}")
    return known[name]


_SKIPPED = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ lib2to3 idlelib turtledemo encodings ensurepip pydoc_data".split()
)
"""Folders of the standard library that are tests, packages of others, tables or generated."""


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
            "this Python carries no pydoc_data", where=str(root), fix="use a complete Python (python.org, uv, pyenv)"
        ) from error
    named = {f"topics/{name}": text for name, text in topics.items()}
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if _wanted(path.relative_to(root))}
    for name in sorted([*named, *files], key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield named[name] if name in named else files[name].read_text(encoding="utf-8", errors="replace")


def _wanted(path: Path) -> bool:
    return not any(part in _SKIPPED or part.startswith("config-") for part in path.parts[:-1])


def _remotes(folder: str, *names: str, **known: Any) -> tuple[Remote, ...]:
    return tuple(Remote(f"{folder}/{name}", name, **known) for name in names)


def _c4(folder: str, parts: int) -> tuple[Remote, ...]:
    return _remotes(f"{C4}/{folder}", *(f"c4-train.{part:05d}-of-{parts:05d}.json.gz" for part in range(parts)))


def _pile(shards: int) -> tuple[Remote, ...]:
    return _remotes(PILE, *(f"{shard:02d}.jsonl.zst" for shard in range(shards)))


# Where only another collection of the same kind of text is public, `about` says which one it is.
CORPORA: tuple[Corpus, ...] = (
    Corpus("pydoc", "Python's own help topics and sources", local=pydoc, vocab_size=4096),
    Corpus("enwik8", "the first 100 MB of a Wikipedia dump", urls=_remotes(ENWIK8, "enwik8.zip", size_bytes=36_445_475)),
    Corpus("c4", "Colossal Clean Crawled Corpus, English, 305 GB", urls=_c4("en", 1024)),
    Corpus("c4_openwebtext", "C4, news-like pages, 15 GB", urls=_c4("realnewslike", 512)),
    Corpus("pile", "the Pile without its copyrighted components (monology/pile-uncopyrighted)", urls=_pile(PILE_SHARDS)),
    Corpus("pile_subset", "the first of 30 shuffled parts of that Pile", urls=_pile(1)),
    Corpus(
        "enron",
        "Enron e-mails as published by CMU, headers included",
        urls=_remotes("https://www.cs.cmu.edu/~enron", "enron_mail_20150507.tar.gz"),
    ),
    Corpus("github", f"GitHub sources; {GONE}"),
    Corpus("arxiv", f"arXiv papers of the Common Pile ({GONE})", hub="common-pile/arxiv_papers"),
    Corpus(
        "europarl",
        f"European Parliament proceedings, release 7, with its tags ({GONE})",
        urls=_remotes("https://www.statmt.org/europarl/v7", "europarl.tgz"),
    ),
    Corpus("freelaw", f"US case law of the Common Pile ({GONE})", hub="common-pile/caselaw_access_project"),
    Corpus("nih", f"NIH grant abstracts; {GONE}, and the NIH gives CSV tables by year (reporter.nih.gov/exporter)"),
    Corpus("pubmed", f"PubMed Central articles of the Common Pile ({GONE})", hub="common-pile/pubmed"),
    Corpus("books1", "BookCorpus; withdrawn by its hosts"),
    Corpus("books3", "books; withdrawn component of the Pile"),
    Corpus("hackernews", f"Hacker News comments; {GONE}"),
    Corpus(
        "openwebtext2",
        f"pages linked from Reddit ({GONE}; this is a copy of it, segyges/OpenWebText2)",
        urls=_remotes("https://huggingface.co/datasets/segyges/OpenWebText2/resolve/main", "openwebtext2.jsonl.zst.tar"),
    ),
    Corpus("stackexchange", f"StackExchange questions and answers of the Common Pile ({GONE})", hub="common-pile/stackexchange"),
    Corpus("ubuntu_irc", f"Ubuntu IRC logs of the Common Pile ({GONE})", hub="common-pile/ubuntu_irc"),
    Corpus("youtube_subtitles", f"transcripts of openly licensed YouTube videos of the Common Pile ({GONE})", hub="common-pile/youtube"),
)
