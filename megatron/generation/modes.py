# SPDX-License-Identifier: Apache-2.0
"""Generation as a user calls it: unconditional, from a file of prompts, interactive; and the logits of given tokens, file to file.

FORMAT: output is JSON lines with context, text, length, finished, message, duration_seconds and, if asked for, logits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.lib.format import open_memmap

from megatron import fault_injection
from megatron.atomic_io import atomic_write
from megatron.errors import DataError, StoppedError
from megatron.generation.decode import Completion, DecodeSettings, ModelScorer, decode
from megatron.model.transformer import Transformer
from megatron.mpu.collectives import of_all_ranks, on_first_rank
from megatron.mpu.groups import Group
from megatron.tokenizer import Tokenizer

ROWS = 16  # texts decoded together at most

Record = dict[str, Any]


class TextGenType(str, Enum):
    """Values of the `text_gen_type` key."""

    UNCONDITIONAL = "unconditional"
    INPUT_FILE = "input-file"
    INTERACTIVE = "interactive"
    PRECOMPUTE = "precompute"


@dataclass(frozen=True)
class Writer:
    """A model that writes: scorer, tokenizer and settings together.

    seed:     the same seed gives the same texts
    received: signals to this process so far: with one, no further text is begun
    world:    ranks that decode together: they stop together, and the first one reads and writes
    """

    scorer: ModelScorer
    tokenizer: Tokenizer
    settings: DecodeSettings
    seed: int = 1234
    received: Sequence[int] = ()
    world: Group = field(default_factory=Group.single)

    def told(self) -> int | None:
        """The signal by which any rank was told to stop; all ranks call this together."""
        return first_signal(self.received, self.world)

    def ids(self, context: str) -> list[int]:
        """Ids of a context; an empty one starts, like a document, after an eod."""
        return self.tokenizer.encode(context) or [self.tokenizer.eod]

    def generator(self, index: int) -> torch.Generator:
        """The random stream of text number `index`."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)

    def write(self, contexts: Sequence[str]) -> list[Record]:
        """One record per context, in order. A text does not depend on the other contexts, only on its own and its number.

        A request to stop leaves out the contexts that were not begun.
        """
        prompts = [self.ids(context) for context in contexts]
        records: list[Record | None] = [None] * len(contexts)
        for numbers in self._batches(prompts):
            fault_injection.point("generate")
            if self.told():
                break
            start = time.monotonic()
            batch = torch.tensor([prompts[number] for number in numbers])
            completions = decode(self.scorer, batch, self.settings, [self.generator(number) for number in numbers])
            seconds = time.monotonic() - start
            for number, completion in zip(numbers, completions, strict=True):
                records[number] = self.record(contexts[number], completion, seconds)
        for number, prompt in enumerate(prompts):
            if len(prompt) >= self.scorer.longest:
                records[number] = self.record(contexts[number], None, message=self.too_long(prompt))
        return [record for record in records if record is not None]

    def write_file(self, contexts: Sequence[str], output: Path) -> list[Record]:
        """Write a record per context to `output`; raises StoppedError where a request to stop has cut the texts short."""
        records = self.write(contexts)
        if self.world.rank == 0:
            write_records(records, output)
        if len(records) < len(contexts) and (signal := self.told()):
            raise StoppedError(signal, f" after {len(records)} of {len(contexts)} texts", where=str(output))
        return records

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of prompts of one length, so that no row needs padding; those that leave no room are left out."""
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            if len(prompt) < self.scorer.longest:
                by_length.setdefault(len(prompt), []).append(number)
        for numbers in by_length.values():
            for start in range(0, len(numbers), ROWS):
                yield numbers[start : start + ROWS]

    def record(self, context: str, completion: Completion | None, seconds: float = 0.0, message: str | None = None) -> Record:
        """One line of output. completion: None where there is no text; message: why not"""
        record: Record = {
            "context": context,
            "text": None if completion is None else self.tokenizer.decode(completion.ids),
            "length": 0 if completion is None else len(completion.ids),
            "finished": completion is not None and completion.finished,
            "message": message,
            "duration_seconds": seconds,
        }
        if self.settings.keep_logits:
            record["logits"] = [] if completion is None else [logits.tolist() for logits in completion.logits]
        return record

    def too_long(self, prompt: Sequence[int]) -> str:
        """What is said of a context that leaves no room for a single token."""
        return f"WARNING: no text, the context has {len(prompt)} tokens and the model sees {self.scorer.longest}"


def first_signal(received: Sequence[int], world: Group) -> int | None:
    """The first signal that any rank has received, the same on all of them."""
    return next((signals[0] for signals in of_all_ranks(tuple(received), world) if signals), None)


def unconditional(writer: Writer, num_samples: int, output: Path) -> list[Record]:
    """Write `num_samples` texts from nothing to `output`."""
    return writer.write_file([""] * num_samples, output)


def input_file(writer: Writer, prompts: Path, prompt_end: str, output: Path | None) -> Path:
    """Continue every prompt of a file, split at `prompt_end`; returns the output's path, by default `<prompts>.output.jsonl`."""
    if not prompts.is_file():
        raise DataError(f"there is no {prompts}", where="sample_input_file", fix="check the path")
    try:
        entries = [entry.strip() for entry in prompts.read_text(encoding="utf-8").split(prompt_end)]
    except UnicodeDecodeError as error:
        raise DataError(f"{prompts} is not UTF-8 text: {error.reason} at byte {error.start}", where="sample_input_file") from error
    contexts = [entry for entry in entries if entry]
    if not contexts:
        raise DataError(f"{prompts} holds no prompt", where="sample_input_file", fix=f"prompts end with {prompt_end!r} (prompt_end)")
    output = output or prompts.with_name(f"{prompts.name}.output.jsonl")
    writer.write_file(contexts, output)
    return output


def interactive(writer: Writer, prompt_end: str, source: TextIO, screen: TextIO) -> None:
    """Ask for contexts until the input ends; the text appears as it grows."""
    number = 0
    world = writer.world
    screen = screen if world.rank == 0 else StringIO()
    while (context := on_first_rank(lambda: _ask(prompt_end, source, screen), world)) is not None:
        prompt = writer.ids(context)
        if len(prompt) >= writer.scorer.longest:
            screen.write(f"{writer.too_long(prompt)}\n")
            continue
        screen.write("Generated Text: ")
        ids: list[int] = []
        shown = ""

        def show(_row: int, token: int, ids: list[int] = ids) -> None:
            nonlocal shown
            ids.append(token)
            text = writer.tokenizer.decode(ids)
            # The last characters may still be half of a character, or the start of a longer one.
            if not text.endswith("\ufffd"):
                screen.write(text[len(shown) :])
                screen.flush()
                shown = text

        [completion] = decode(writer.scorer, torch.tensor([prompt]), writer.settings, [writer.generator(number)], show)
        screen.write(writer.tokenizer.decode(completion.ids)[len(shown) :])
        screen.write("\n<press enter to continue>")
        screen.flush()
        if not on_first_rank(source.readline, world):
            return
        number += 1


def _ask(prompt_end: str, source: TextIO, screen: TextIO) -> str | None:
    """The next context, without `prompt_end`; None when the input ends."""
    screen.write("Context prompt >>> ")
    screen.flush()
    typed = ""
    while line := source.readline():
        typed += line
        if prompt_end == "\n" or typed.rstrip("\n").endswith(prompt_end):
            return typed.rstrip("\n").removesuffix(prompt_end).strip()
    screen.write("\n")
    return typed.strip() or None


def write_records(records: Sequence[Record], path: Path) -> None:
    """JSON lines, written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as out:
        for record in records:
            out.write(json.dumps(record) + "\n")


@torch.inference_mode()
def write_logits(model: Transformer, tokens_file: Path, output: Path, *, rows: int = 1, write: bool = True) -> tuple[int, ...]:
    """tokens [b, s] integers (.npy) -> logits [b, s, v] float32 (.npy, aside and renamed); returns the shape.

    v is the padded vocabulary. All ranks that share the model call this; those with `write` False write nothing.
    Raises DataError for tokens of another shape, dtype or range.
    """
    tokens = _tokens(tokens_file, model.spec.vocab_size)
    shape = (*tokens.shape, model.spec.vocab_size)
    device = next(model.parameters()).device
    aside = output.with_name(f"{output.name}.tmp.{os.getpid()}")
    logits = None
    if write:
        output.parent.mkdir(parents=True, exist_ok=True)
        logits = open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, len(tokens), rows):
        part = torch.from_numpy(tokens[start : start + rows].astype(np.int64)).to(device)
        found = model(part, read=lambda handle: handle.full().float())
        if logits is not None:
            logits[start : start + rows] = found.cpu().numpy()
    if logits is not None:
        logits.flush()
        del logits  # closes the file before it gets its name
        aside.replace(output)
    return shape


def _tokens(path: Path, vocab_size: int) -> np.ndarray:
    fix = "save integers [b, s] with numpy.save"
    if not path.is_file():
        raise DataError(f"there is no {path}", where="--tokens", fix=fix)
    try:
        tokens = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is not a .npy file: {error}", where="--tokens", fix=fix) from error
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.size == 0:
        raise DataError(f"{path} holds {tokens.dtype} {list(tokens.shape)}", where="--tokens", fix=fix)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(f"{path} holds tokens {tokens.min()} to {tokens.max()}, not 0 to {vocab_size - 1}", where="--tokens", fix=fix)
    return np.asarray(tokens)
