# SPDX-License-Identifier: Apache-2.0
"""How many threads the tokenizer libraries use. Knows their environment variables, no library."""

from __future__ import annotations

import os


def set_library_threads(number: int) -> None:
    """Threads of `tokenizers` and gigatoken in this process and those it starts.

    Both read the environment when they are first used, once: call this before. A process started by multiprocessing uses gigatoken on
    one thread whatever the number, so that processes, not threads, are how work is spread.
    """
    os.environ["RAYON_NUM_THREADS"] = str(number)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if number > 1 else "false"
