# SPDX-License-Identifier: Apache-2.0
"""Near duplicates planted at known similarities: who is found, and that nobody else is; equal documents, against a dictionary."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.cleaning.deduplication import Keep, choose_near, find_same, join, write_hashes
from megatron.data.cleaning.document import Document
from megatron.data.cleaning.pipeline import removed_of
from megatron.data.cleaning.plan import NearSettings
from support.cleaning import near_pair, nonsense, run

PLANTED = {0.95: (5, 39), 0.8: (22, 9), 0.5: (66, 3)}
"""similarity -> (shingles that differ, all shingles / those)"""


def five_grams(text):
    words = text.split()
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def similarity(left, right):
    """The truth, by sets of tuples."""
    a, b = five_grams(left), five_grams(right)
    return len(a & b) / len(a | b)


def plant(pairs, seed):
    """Records (id: similarity/pair/side), pairs apart from each other and unrelated ones between them."""
    rng = random.Random(seed)
    records = []
    for level, (changed, ratio) in PLANTED.items():
        for number in range(pairs):
            for side, text in enumerate(near_pair(rng, changed, ratio)):
                records.append({"id": f"{level}/{number}/{side}", "text": text})
    records += [{"id": f"alone/{number}/0", "text": " ".join(nonsense(rng, 200))} for number in range(2 * pairs)]
    rng.shuffle(records)
    return records


def found_at(records, kept):
    """(similarity -> share of pairs that lost one, true similarity of every dropped document to its partner)"""
    texts = {record["id"]: record["text"] for record in records}
    gone = set(texts) - {record["id"] for record in kept}
    truth = []
    for name in gone:
        level, number, side = name.split("/")
        partner = f"{level}/{number}/{1 - int(side)}"
        truth.append(similarity(texts[name], texts[partner]) if partner in texts else 0.0)
        assert partner not in gone
    share = {level: sum(name.startswith(f"{level}/") for name in gone) / (len(texts) // 8) for level in PLANTED}
    return share, np.array(truth)


def test_planted_pairs_have_their_similarity():
    rng = random.Random(0)
    for level, (changed, ratio) in PLANTED.items():
        assert similarity(*near_pair(rng, changed, ratio)) == pytest.approx(level)


@pytest.mark.parametrize("pairs", [pytest.param(60, id="few"), pytest.param(200, id="many", marks=pytest.mark.full)])
def test_recall_and_precision(pairs, tmp_path):
    records = plant(pairs, seed=3)
    # Without a run of five words a text has no shingle, and is never taken for a near duplicate.
    short = [{"id": f"short/{side}/0", "text": "one two three four"} for side in range(2)]
    kept, report = run(records + short, tmp_path, near=NearSettings(), tasks=3)
    assert kept[-2:] == short
    share, truth = found_at(records, kept)
    assert share[0.95] >= 0.99
    assert share[0.8] >= 0.85
    assert share[0.5] < 0.08
    assert (truth >= 0.75).mean() >= 0.95  # precision
    assert truth.min() >= 0.49  # an unrelated document is never taken for a duplicate
    assert report["dropped"] == {"near/near duplicate": len(truth)}


@pytest.mark.full
def test_every_seed_follows_the_curve(tmp_path):
    """1 - (1 - s ** rows) ** bands, to within four standard errors of all pairs together."""
    records = plant(100, seed=5)
    shares = []
    for seed in range(1, 6):
        (folder := tmp_path / str(seed)).mkdir()
        shares.append(found_at(records, run(records, folder, near=NearSettings(), seed=seed)[0])[0])
    for level in PLANTED:
        theory = 1 - (1 - level**8) ** 14
        mean = sum(share[level] for share in shares) / len(shares)
        assert abs(mean - theory) <= 4 * (theory * (1 - theory) / 500) ** 0.5 + 1e-3, level
    assert len({share[0.8] for share in shares}) > 1


def test_pairs_are_checked_when_a_similarity_is_asked_for(tmp_path):
    records = plant(12, seed=4)
    kept, _ = run(records, tmp_path, near=NearSettings(jaccard=0.85, bands=20, rows=4), tasks=2)
    share, truth = found_at(records, kept)
    assert share[0.95] == 1
    assert share[0.8] == share[0.5] == 0
    assert truth.min() >= 0.85


@pytest.mark.parametrize(("keep", "gone"), [(Keep.LONGEST, {0: {0, 1}, 1: {1}}), (Keep.EARLIEST, {0: {1}, 1: {0, 1}})])
def test_who_stays(keep, gone, tmp_path):
    """Task 0 holds documents of 5, 6 and 9 characters, task 1 of 7 and 7; all but the third belong together."""
    for folder in ("pairs", "documents"):
        (tmp_path / folder).mkdir()
    np.array([[0, 0, 0, 1], [0, 1, 1, 1]], dtype="<u4").tofile(tmp_path / "pairs" / "00000_00.dups")
    np.array([[0, 0, 1, 0]], dtype="<u4").tofile(tmp_path / "pairs" / "00001_00.dups")
    for task, lengths in enumerate(([5, 6, 9], [7, 7])):
        np.save(tmp_path / "documents" / f"{task:05d}.lengths.npy", np.array(lengths))
    choose_near(None, 0, 1, folder=tmp_path, keep=keep)
    assert {task: removed_of(tmp_path, task) for task in (0, 1)} == gone


def test_groups_do_not_depend_on_the_order_of_pairs():
    rng = random.Random(2)
    pairs = [(rng.randrange(200), rng.randrange(200)) for _ in range(120)]
    groups = join(200, pairs)
    backwards = join(200, [(b, a) for a, b in reversed(pairs)])
    assert groups.tolist() == backwards.tolist()
    assert all(groups[a] == groups[b] for a, b in pairs)
    assert all(groups[group] == group <= at for at, group in enumerate(groups))


TEXTS = st.text(alphabet="aA b\n", max_size=6)


@settings(max_examples=25, deadline=None)
@given(tasks=st.lists(st.lists(TEXTS, max_size=8), min_size=1, max_size=4), ranges=st.sampled_from([1, 3, 16]))
def test_all_but_the_earliest_go(tasks, ranges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    for rank, texts in enumerate(tasks):
        documents = [Document(text, "") for text in texts]
        assert list(write_hashes(iter(documents), rank, len(tasks), folder=folder)) == documents
    for part in range(ranges):
        find_same(None, part, ranges, folder=folder)
    seen: set[str] = set()
    for rank, texts in enumerate(tasks):
        again = set()
        for number, text in enumerate(texts):
            plain = " ".join(text.lower().split())
            if plain in seen:
                again.add(number)
            seen.add(plain)
        assert removed_of(folder, rank) == again


URLS = ["http://a.org/x", None, "https://A.org/x/", "a.org/x#top", "a.org/X", "a.org/x?q=1", "", "b.org"]


def test_addresses_are_compared_before_texts(tmp_path):
    records = [{"text": f"text {at % 3}", "meta": {"url": url}} for at, url in enumerate(URLS)]
    kept, report = run(records, tmp_path, url_key="meta.url", exact=True, tasks=2)
    assert report["dropped"] == {"url/same address": 2, "exact/same text": 3}
    # 2 and 3 went for their addresses, so the first document with text 2 is 5.
    assert kept == [records[at] for at in (0, 1, 5)]
    assert [stage["documents_in"] for stage in report["stages"]] == [8, 6]
