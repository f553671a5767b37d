# SPDX-License-Identifier: Apache-2.0
"""One stream while it is being written: values and sizes in two growing files, sealed into a `.bin/.idx` pair.

Memory does not grow with the number of documents.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.data.indexed_dataset import write_index
from megatron.data.preprocess import legacy_index
from megatron.data.preprocess.encoders import Ragged, StreamFormat
from megatron.errors import DataError

STEP = 1 << 20  # documents, or values, handled at once when a stream is sealed


class StreamFiles:
    """`<folder>/<name>.values` and `<name>.sizes`, appended to and cut back to what a record of progress says."""

    def __init__(self, folder: Path, name: str, stream: StreamFormat) -> None:
        self.name = name
        self.stream = stream
        self.num_values = 0
        self.documents = 0
        self.whole = True
        self._values_path = folder / f"{name}.values"
        self._sizes_path = folder / f"{name}.sizes"
        self._files: list[IO[bytes]] = []

    def open(self, state: dict[str, Any] | None) -> None:
        """Start anew, or go on from `state`; what was written after it is cut off."""
        state = state or {"values": 0, "documents": 0, "whole": True}
        self.num_values, self.documents, self.whole = state["values"], state["documents"], state["whole"]
        for path, size in ((self._values_path, self.num_values * self.stream.dtype.itemsize), (self._sizes_path, self.documents * 4)):
            path.touch()
            if path.stat().st_size < size:
                raise DataError(
                    f"{path} is shorter than its record of progress says", where=str(path), fix=f"remove {path.parent} and start again"
                )
            os.truncate(path, size)
            self._files.append(path.open("ab"))

    def append(self, part: Ragged) -> None:
        """Add documents. Values are of the stream's dtype already."""
        if self.stream.integral is not None and self.whole:
            self.whole = bool((part.values == np.rint(part.values)).all())
        self._files[0].write(np.ascontiguousarray(part.values).data)
        self._files[1].write(np.ascontiguousarray(part.sizes, dtype="<i4").data)
        self.num_values += len(part.values)
        self.documents += len(part.sizes)

    def state(self) -> dict[str, Any]:
        """Flush to disk, and say how far it is."""
        for file in self._files:
            file.flush()
            os.fdatasync(file.fileno())
        return {"values": self.num_values, "documents": self.documents, "whole": self.whole}

    def close(self) -> None:
        """Close both files."""
        for file in self._files:
            try:
                file.close()
            except OSError:  # a full disk fails once more when buffers are flushed; it was reported by the write
                pass
        self._files = []

    def seal(self, *, legacy: bool = False) -> tuple[Path, Path]:
        """Make the index, and where all values are whole the narrower data. Returns the files that become `.bin` and `.idx`.

        legacy: the index in the old TNTIDX format
        """
        self.close()
        data, dtype = self._values_path, self.stream.dtype
        if self.stream.integral is not None and self.whole:
            data, dtype = data.with_suffix(".integral"), self.stream.integral
            self._convert(data, dtype)
        index = self._values_path.with_suffix(".index")
        with index.open("wb") as file:
            if legacy:
                legacy_index.write(file, self._sizes(), dtype)
            else:
                self._write_index(file, dtype)
            file.flush()
            os.fsync(file.fileno())
        return data, index

    def _sizes(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.memmap(self._sizes_path, dtype="<i4", mode="r") if self.documents else np.zeros(0, "<i4")

    def _convert(self, path: Path, dtype: np.dtype[Any]) -> None:
        with path.open("wb") as file:
            values = np.memmap(self._values_path, dtype=self.stream.dtype, mode="r") if self.num_values else np.zeros(0, dtype)
            for start in range(0, len(values), STEP):
                file.write(values[start : start + STEP].astype(dtype).data)
            file.flush()
            os.fsync(file.fileno())

    def _write_index(self, file: IO[bytes], dtype: np.dtype[Any]) -> None:
        sizes, documents = self._sizes(), self.documents
        firsts = range(0, documents, STEP)
        write_index(
            file,
            dtype.newbyteorder("<"),
            (documents, documents),
            lambda: (sizes[first : first + STEP] for first in firsts),
            (np.arange(first + 1, min(first + STEP, documents) + 1) for first in firsts),
        )
