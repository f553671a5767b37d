# SPDX-License-Identifier: Apache-2.0
"""How long the samples of a set are, and which max_length suits them.

Letters: n samples, k rows per sample (1 for single sequences; 2 for preference pairs: chosen, rejected).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.data.indexed_dataset import IndexedDataset, exists
from megatron.data.inspect.inspecting import first_trained, labels_beside, quantiles
from megatron.data.legacy_dataset import LegacyDataset, open_any
from megatron.data.preprocess.blocks import BlockStart, RecordSource
from megatron.data.preprocess.encoders import LENGTHS, EncodedRecords, EncoderSource, Ragged
from megatron.data.preprocess.writer import Options, encoded
from megatron.errors import DataError

LIMITS = tuple(2**power for power in range(10, 16))


@dataclass(frozen=True)
class Lengths:
    """Tokens of every sample.

    rows:   [n, k] tokens of each whole sequence, prompt included
    prompt: [n, k] tokens before the first trained one (the whole length where none is trained); None where not known
    """

    rows: NDArray[np.int64]
    prompt: NDArray[np.int64] | None = None

    @property
    def columns(self) -> dict[str, NDArray[np.int64]]:
        """The columns of the report, [n] each."""
        prompts = {} if self.prompt is None else {"prompt": self.prompt.max(axis=1)}
        if self.rows.shape[1] == 1:
            return {**prompts, "length": self.rows[:, 0]}
        chosen, rejected = self.rows.T
        return {**prompts, "chosen": chosen, "rejected": rejected, "max": self.rows.max(axis=1), "total": self.rows.sum(axis=1)}

    @property
    def longest(self) -> NDArray[np.int64]:
        """[n] the row that max_length must hold."""
        longest: NDArray[np.int64] = self.rows.max(axis=1)
        return longest


class Column(NamedTuple):
    """One column in numbers. within: limit -> share of samples not longer."""

    n: int
    lengths: dict[str, float]
    within: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the tool reports.

    prompt_exceeds:  limit -> share of samples whose prompt alone is longer
    nothing_trained: limit -> share of samples with a row that keeps no trained token when cut there
    tokens:          of one epoch, cut at max_length; hours: at the given speed, without padding
    """

    samples: int
    pairs: bool
    columns: dict[str, Column]
    coverage: float
    recommended: int
    max_length: int
    prompt_exceeds: dict[int, float] | None
    nothing_trained: dict[int, float] | None
    tokens: int
    hours: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; named tuples become objects."""
        return {**asdict(self), "columns": {name: column._asdict() for name, column in self.columns.items()}}


def of_pairs(prompt: ArrayLike, chosen: ArrayLike, rejected: ArrayLike) -> Lengths:
    """From the tokens of prompts and of whole sequences (prompt included), [n] each.

    >>> of_pairs([2], [5], [4]).columns["total"].tolist()
    [9]
    """
    rows = np.stack([np.asarray(chosen, dtype=np.int64), np.asarray(rejected, dtype=np.int64)], axis=1)
    prompts = np.repeat(np.asarray(prompt, dtype=np.int64)[:, None], 2, axis=1)
    bad = np.flatnonzero(((prompts > rows) | (prompts < 0)).any(axis=1))
    if len(bad):
        first = int(bad[0])
        raise DataError(
            f"pair {first} has a prompt of {prompts[first, 0]} tokens in sequences of {rows[first, 0]} and {rows[first, 1]}",
            fix="chosen and rejected are counted with their prompt",
        )
    return Lengths(rows, prompts)


def read_lengths(prefixes: Sequence[str], *, rejected: str | None = None) -> Lengths:
    """The samples of one or several prefixes, of the kind that the names beside each tell:

    P_lengths_document, the numbers of pairs; P_chosen_document and P_rejected_document; else single sequences, with labels or without.
    rejected: the prefix that holds the rejected sequences of `prefixes`, which is then one prefix of the chosen ones
    """
    if rejected is not None:
        if len(prefixes) != 1:
            raise DataError("one prefix of chosen sequences goes with --rejected", fix="merge the pairs first, or give one of them")
        return _pair(prefixes[0], rejected)
    parts = [_read(prefix) for prefix in prefixes]
    if len({part.rows.shape[1] for part in parts}) > 1:
        raise DataError("some inputs are preference pairs, others single sequences", fix="look at them one after the other")
    return _joined(parts)


def summarise(lengths: Lengths, *, coverage: float = 0.95, max_length: int | None = None, tokens_per_second: float | None = None) -> Report:
    """All numbers. `max_length` None takes the recommended one."""
    if not len(lengths.rows) or not int(lengths.rows.sum()):
        raise DataError("there is no sample with any token", fix="give another input")
    columns = {name: _column(values) for name, values in lengths.columns.items()}
    recommended = recommend(lengths.longest, coverage)
    limit = max_length or recommended
    cut = np.minimum(lengths.rows, limit)
    tokens = int(cut.sum())
    prompt = lengths.prompt
    return Report(
        samples=len(cut),
        pairs=cut.shape[1] == 2,
        columns=columns,
        coverage=coverage,
        recommended=recommended,
        max_length=limit,
        prompt_exceeds=None if prompt is None else {one: float((prompt > one).any(axis=1).mean()) for one in LIMITS},
        nothing_trained=None
        if prompt is None
        else {one: float(((prompt >= np.minimum(lengths.rows, one)).any(axis=1)).mean()) for one in LIMITS},
        tokens=tokens,
        hours=tokens / tokens_per_second / 3600 if tokens_per_second else None,
    )


def recommend(longest: NDArray[np.int64], coverage: float) -> int:
    """Smallest power of two that holds at least `coverage` of the samples whole.

    >>> recommend(np.array([100, 200, 300, 5000]), 0.75), recommend(np.array([100, 200, 300, 5000]), 0.95)
    (512, 8192)
    """
    if not 0 < coverage <= 1:
        raise DataError(
            f"--coverage {coverage} is not a share", where="command line", fix="give a number above 0 and up to 1, such as 0.95"
        )
    need = np.sort(longest)[math.ceil(round(coverage * len(longest), 9)) - 1]
    return int(2 ** math.ceil(math.log2(max(int(need), 1))))


def _column(values: NDArray[np.int64]) -> Column:
    within = {limit: float((values <= limit).mean()) for limit in LIMITS}
    return Column(len(values), quantiles(values), within)


def _read(prefix: str) -> Lengths:
    stem = prefix.removesuffix("_lengths_document")
    if exists(f"{stem}_lengths_document"):
        return _stored(stem)
    if exists(f"{prefix}_chosen_document") and exists(f"{prefix}_rejected_document"):
        return _pair(f"{prefix}_chosen_document", f"{prefix}_rejected_document")
    return _single(prefix)


def _single(prefix: str) -> Lengths:
    tokens = open_any(prefix)
    beside = labels_beside(prefix)
    labels = None if beside is None else open_any(beside)
    if labels is not None and not np.array_equal(tokens.sizes, labels.sizes):
        raise DataError(
            "the labels have other lengths than the tokens", where=beside, fix="look at both with tools/datasets/inspect_dataset.py"
        )
    return _of_sequences(tokens.sizes, labels)


def _of_sequences(sizes: NDArray[np.int32], labels: IndexedDataset | LegacyDataset | Ragged | None) -> Lengths:
    return Lengths(sizes.astype(np.int64)[:, None], None if labels is None else first_trained(labels.values, labels.sizes)[:, None])


def _joined(parts: Sequence[Lengths], axis: int = 0) -> Lengths:
    prompts = [part.prompt for part in parts if part.prompt is not None]
    rows = np.concatenate([part.rows for part in parts], axis=axis)
    return Lengths(rows, np.concatenate(prompts, axis=axis) if len(prompts) == len(parts) else None)


def _pair(chosen: str, rejected: str) -> Lengths:
    sides = [_single(chosen), _single(rejected)]
    if len(sides[0].rows) != len(sides[1].rows):
        raise DataError(
            f"{len(sides[0].rows)} chosen documents, {len(sides[1].rows)} rejected", where=rejected, fix="make both from the same file"
        )
    return _joined(sides, axis=1)


def _stored(stem: str) -> Lengths:
    """FORMAT: `<stem>_lengths_document` holds the tokens of the prompt, the chosen and the rejected answer of each pair."""
    path = f"{stem}_lengths_document"
    stored = open_any(path)
    if bool((stored.sizes != 3).any()):
        raise DataError("a document of lengths must hold three numbers", where=path, fix="make the set again")
    lengths = _of_triples(stored.values)
    tokens = f"{stem}_chosen_document"
    if exists(tokens) and not np.array_equal(open_any(tokens).sizes, lengths.rows[:, 0]):
        raise DataError("the stored lengths are not those of the token files", where=path, fix="make the set again")
    return lengths


def _of_triples(values: NDArray[Any]) -> Lengths:
    prompt, chosen, rejected = values.astype(np.int64).reshape(-1, 3).T
    return of_pairs(prompt, prompt + chosen, prompt + rejected)


class Measured(NamedTuple):
    """lengths: of the records that give a sample; left_out: reason -> records that give none"""

    lengths: Lengths
    left_out: Counter[str]


def measure(source: RecordSource, encoder_source: EncoderSource, *, workers: int = 1, skip_bad: int = 0) -> Measured:
    """Encode every record. Raises DataError for more than `skip_bad` malformed ones."""
    parts: list[Lengths] = []
    left_out: Counter[str] = Counter()
    for done in encoded(source, None, encoder_source, BlockStart(), Options(workers=workers)):
        if done.num_faults:
            left_out["malformed"] += done.num_faults
            if left_out["malformed"] > skip_bad:
                where, what = done.faults[0]
                raise DataError(what, where=where, fix="fix or remove the record, or leave some out with --skip-bad N")
        left_out += done.batch.dropped
        if done.batch.documents:
            parts.append(_lengths(done.batch))
    if not parts:
        raise DataError("no record gives a sample", fix="check the input and its keys")
    return Measured(_joined(parts), left_out)


def _lengths(batch: EncodedRecords) -> Lengths:
    """Pairs tell their lengths themselves; else the first stream is one of tokens."""
    if LENGTHS in batch.streams:
        return _of_triples(batch.streams[LENGTHS].values)
    key = next(iter(batch.streams))
    return _of_sequences(batch.streams[key].sizes, batch.streams.get(f"{key}_label"))
