# SPDX-License-Identifier: Apache-2.0
"""Makes the next thing while the last one is used. Knows nothing of what they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(things: Iterable[T]) -> Iterator[T]:
    """The same things in order; a thread makes one of them in advance, and no more.

    >>> list(ahead(n * n for n in range(4)))
    [0, 1, 4, 9]
    """
    coming, end = iter(things), object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        following = pool.submit(next, coming, end)
        while (thing := following.result()) is not end:
            following = pool.submit(next, coming, end)
            made: Any = thing
            yield made
