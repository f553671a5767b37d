# SPDX-License-Identifier: Apache-2.0
"""The one file that imports datatrove: its filters, MinHash steps and executors, set up to need no model and no network.

The steps' `folder` is that of the stage, see deduplication.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.logging import logger, setup_default_logger
from datatrove.utils.word_tokenizers import WordTokenizer
from filelock import FileLock
from numpy.typing import NDArray

from megatron.data.cleaning.document import Document, Step
from megatron.data.cleaning.words import hash_runs, hash_words, plain_words, sentence_spans, split_words
from megatron.errors import BackendError

BLOCK = 4096


class PlainWords(WordTokenizer):  # type: ignore[misc]
    """Our splitter, in the shape datatrove's steps take; its own ones need spaCy."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words and runs of marks."""
        return split_words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Sentences."""
        return [text[start:end] for start, end in sentence_spans(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of sentences."""
        return list(sentence_spans(text))


def quality_filters(names: Sequence[str], stop_words: tuple[str, ...] | None) -> list[tuple[str, Any]]:
    """(name, filter) of sets of rules, with `filter(document)` -> kept, or (kept, reason)."""
    words = PlainWords()
    least = None if stop_words == () else 2
    made: dict[str, list[tuple[str, Any]]] = {
        "gopher": [
            # Lengths first: in a short text any three words are a large part, and "repetition" would be the wrong name for it.
            ("gopher", GopherQualityFilter(language=words, min_stop_words=least, stop_words=list(stop_words) if stop_words else None)),
            ("gopher repetition", GopherRepetitionFilter(language=words)),
        ],
        "c4": [("c4", C4QualityFilter(language=words))],
        "fineweb": [("fineweb", FineWebQualityFilter(language=words))],
    }
    return [rule for name in names for rule in made[name]]


class WordSignatures(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's signatures over runs of our words: its own hashing of runs fails with xxhash 4 and is many times slower."""

    def get_shingles(self, text: str) -> NDArray[np.uint64]:
        """[runs, 1] numbers, none for a text of fewer words than a run has."""
        return hash_runs(hash_words(plain_words(text)), self.config.n_grams).reshape(-1, 1)

    def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
        """The smallest of blocks' smallest: at once, a book of a million words would take gigabytes."""
        blocks = [super(WordSignatures, self).get_signature(shingles[at : at + BLOCK]) for at in range(0, len(shingles), BLOCK)]
        smallest: list[list[int]] = np.minimum.reduce(blocks).tolist()
        return smallest


def minhash_config(ngram: int, bands: int, rows: int, seed: int) -> MinhashConfig:
    """bands x rows permutations of hashed runs of `ngram` words."""
    return MinhashConfig(n_grams=ngram, num_buckets=bands, hashes_per_bucket=rows, seed=seed)


def write_signatures(data: Iterable[Document], rank: int, world_size: int, *, folder: Path, minhash: MinhashConfig) -> None:
    """Step: write the signatures of a task's documents, sorted, one file per band."""
    WordSignatures(str(folder / "signatures"), minhash, language=PlainWords()).run(data, rank, world_size)


def find_pairs(data: object, rank: int, world_size: int, *, folder: Path, minhash: MinhashConfig) -> None:
    """Step, one task per band: read all tasks' signatures, and write the pairs of documents whose signatures in the band are equal."""
    signatures, pairs = str(folder / "signatures"), str(folder / "pairs")
    MinhashDedupBuckets(signatures, pairs, config=minhash, lines_to_buffer=1000).run(None, rank, world_size)


@contextlib.contextmanager
def _said_to(stream: TextIO) -> Iterator[None]:
    """datatrove's log lines go to `stream`: it always adds the process's stderr, which belongs to the person."""
    with contextlib.redirect_stderr(stream):
        setup_default_logger()
        try:
            yield
        finally:
            logger.remove()


class LocalExecutor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's tasks, completions and logs, on this machine's processes.

    Unlike its parent it starts no manager process, which a killed run would leave behind, and a task waits for the end of the same task of
    a killed run, should a process of that still be at work.
    """

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        folder = Path(self.logging_dir.path)
        with FileLock(folder / f"{rank:05d}.lock"), (folder / "terminal.log").open("a") as stream, _said_to(stream):
            return super()._run_for_rank(rank, local_rank, node_rank)

    def _run_one(self, rank: int) -> None:
        self._run_for_rank(rank)

    def run_with(self, pool: Pool | None) -> Iterator[int]:
        """Run the tasks that are not complete, on the pool's processes or, without one, in this process. Yields how many are left."""
        Path(self.logging_dir.path).mkdir(parents=True, exist_ok=True)
        ranks = self.get_incomplete_ranks()
        if pool is not None and len(ranks) > 1:
            ended: Iterable[None] = pool.imap_unordered(self._run_one, ranks)
        else:
            ended = map(self._run_one, ranks)
        for count, _ in enumerate(ended, 1):
            yield len(ranks) - count


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Pool | None]:
    """Processes for all jobs of a run; None for one worker, which is this process. Ctrl-C is left to the caller."""
    if workers == 1:
        yield None
        return
    with multiprocessing.get_context("forkserver").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield pool


def slurm_executor(steps: Sequence[Step], *, tasks: int, logs: Path, after: Any, **options: Any) -> Any:
    """An array job; it starts when `after` ended well. options: its name and what it asks for, as SlurmPipelineExecutor calls them"""
    return SlurmPipelineExecutor(list(steps), tasks=tasks, depends=after, logging_dir=str(logs), qos="", mail_type="NONE", **options)


def submit(executor: Any, log: Path) -> str:
    """Submit an executor and, first, those it depends on. Returns the last job's number, "" when nothing is left to do."""
    with log.open("a") as stream, _said_to(stream):
        try:
            executor.launch_job()
        except FileNotFoundError as error:
            raise BackendError(
                f"{error.filename} is not on this machine", fix="submit from a login node, or use --executor local"
            ) from error
        except subprocess.CalledProcessError as error:
            raise BackendError(f"sbatch ended with status {error.returncode}", where=str(log), fix="read its message above") from error
    return "" if executor.job_id == -1 else str(executor.job_id)


def language_filter(languages: list[str], threshold: float) -> Callable[[str], tuple[str, bool]]:
    """datatrove's fastText filter: text -> (language, whether it is to be kept). Raises BackendError where fastText is not installed."""
    from datatrove.pipeline.filters import LanguageFilter

    try:
        found = LanguageFilter(languages, threshold)
    except ImportError as error:
        raise BackendError(
            "fastText, which finds the language, is not installed",
            fix="uv pip install fasttext-numpy2-wheel fasteners, or --lang-backend stopwords (a few languages, less exact)",
        ) from error

    def judge(text: str) -> tuple[str, bool]:
        document = Document(text, "")
        (code, _), scores = found.model.predict(document)
        return str(code), any(score > threshold for score in scores.values())

    return judge
