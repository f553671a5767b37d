# SPDX-License-Identifier: Apache-2.0
"""The libraries' threads, counted in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
