# SPDX-License-Identifier: Apache-2.0
"""Equal documents across tasks and ranges of hashes, against a dictionary."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.cleaning.document import Document
from megatron.data.cleaning.exact import FindSame, Fingerprint
from megatron.data.cleaning.pipeline import removed_of
from support.cleaning import run

TEXTS = st.text(alphabet="aA b\n", max_size=6)


@settings(max_examples=25, deadline=None)
@given(tasks=st.lists(st.lists(TEXTS, max_size=8), min_size=1, max_size=4), ranges=st.sampled_from([1, 3, 16]))
def test_all_but_the_earliest_go(tasks, ranges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    runs, removed = str(folder / "runs"), str(folder / "removed")
    for rank, texts in enumerate(tasks):
        documents = [Document(text, "") for text in texts]
        assert list(Fingerprint(runs)(iter(documents), rank, len(tasks))) == documents
    for part in range(ranges):
        FindSame(runs, removed)(None, part, ranges)
    seen: set[str] = set()
    for rank, texts in enumerate(tasks):
        again = set()
        for number, text in enumerate(texts):
            plain = " ".join(text.lower().split())
            if plain in seen:
                again.add(number)
            seen.add(plain)
        assert removed_of(folder / "removed", rank) == again


URLS = ["http://a.org/x", None, "https://A.org/x/", "a.org/x#top", "a.org/X", "a.org/x?q=1", "", "b.org"]


def test_addresses_are_compared_before_texts(tmp_path):
    records = [{"text": f"text {at % 3}", "meta": {"url": url}} for at, url in enumerate(URLS)]
    kept, report = run(records, tmp_path, url_key="meta.url", exact=True, tasks=2)
    assert report["dropped"] == {"url/same address": 2, "exact/same text": 3}
    # 2 and 3 went for their addresses, so the first document with text 2 is 5.
    assert kept == [records[at] for at in (0, 1, 5)]
    assert [stage["documents_in"] for stage in report["stages"]] == [8, 6]
