# SPDX-License-Identifier: Apache-2.0
"""The index of the old cached/lazy datasets, written for users whose other tools still read it. Training reads none of them.

FORMAT, all integers little-endian: magic "TNTIDX\\0\\0", u64 version 1, u64 dtype code, u64 bytes per value, u64 number of sequences n,
u64 number of sizes, u64 number of document marks, then int64 arrays: dimension marks [n + 1], value offsets [n + 1], sizes [n], document
marks.
"""

from __future__ import annotations

import struct
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<8sQQQQQQ")
# FORMAT: these codes are not those of the .idx format: 6 and 7 are the floats of C, and there is no uint16.
CODES = {np.dtype("u1"): 1, np.dtype("i1"): 2, np.dtype("<i2"): 3, np.dtype("<i4"): 4, np.dtype("<i8"): 5}


def write(file: IO[bytes], sizes: NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """The index of sequences of these sizes, one document each."""
    count = len(sizes)
    file.write(HEADER.pack(MAGIC, 1, CODES[dtype.newbyteorder("<")], dtype.itemsize, count, count, count + 1))
    file.write(np.arange(count + 1, dtype="<i8").data)
    file.write(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype("<i8").data)
    file.write(sizes.astype("<i8").data)
    file.write(np.arange(count + 1, dtype="<i8").data)
