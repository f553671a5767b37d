# SPDX-License-Identifier: Apache-2.0
"""Saves a run's whole state as a checkpoint folder that is complete or absent, at once or while training goes on.

Every decision that follows from an error is taken by all ranks alike: one that raised alone would leave the others waiting.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron import fault_injection
from megatron.checkpoint.loading.resume_state import capture_rng, write_configs
from megatron.checkpoint.steps.manifest import Manifest
from megatron.checkpoint.steps.step_dirs import PARTIAL, prune, publish, step_tag, write_latest
from megatron.checkpoint.steps.write import RankFileWriter, WrittenFiles, complete_folder
from megatron.engine.base import Engine
from megatron.engine.restore import OURS, RNG, STORED
from megatron.errors import SaveError
from megatron.log import get_logger
from megatron.mpu.collectives import any_ranks, of_all_ranks, on_first_rank, to_first_rank

log = get_logger(__name__)

_FIX = "see that there is room and that the folder can be written; the checkpoints before are untouched, and the run resumes from them"


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A checkpoint under way. manifest: all but the files. seconds: that training stood still for it"""

    writing: RankFileWriter
    manifest: Manifest
    seconds: float = 0.0


@dataclass(kw_only=True)
class Checkpointer:
    """Writes checkpoints of one run. All ranks call each method together, except `abandon`.

    directory: `save`
    compared:  what a later load compares (checkpoint format: "args")
    configs:   the YAML files of the run, by name
    rng:       also keep the random states
    kept:      gives what hooks want to find again after a resume (a W&B run id, ...)
    optimizer: whether the engine writes the optimizer's state
    forward:   gives the logits of a fixed input, to be kept; called on all ranks
    keep_last: how many of the newest checkpoints stay; None = all
    keep_every: multiples of this many steps stay in any case
    protected: steps that stay in any case
    published: is told each folder that has its name, on the first rank, before older ones are deleted
    about:     what manifests say of the run: fields of Manifest, by name
    background: write while training goes on
    failures_allowed: saves in a row that may fail without ending the run

    saved:     step of the last checkpoint that is complete
    seconds:   that the last complete one took, from beginning to end
    failures:  saves that failed so far
    """

    engine: Engine
    directory: Path
    compared: Mapping[str, Any]
    configs: Mapping[str, str]
    rng: bool = True
    kept: Callable[[], Mapping[str, Any]] = dict
    optimizer: bool = True
    forward: Callable[[], Tensor] | None = None
    keep_last: int | None = None
    keep_every: int | None = None
    protected: frozenset[int] = frozenset()
    published: Callable[[Path], None] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    background: bool = False
    failures_allowed: int = 3
    saved: int | None = field(default=None, init=False)
    seconds: float | None = field(default=None, init=False)
    failures: int = field(default=0, init=False)
    _in_a_row: int = field(default=0, init=False)
    _begun: _Begun | None = field(default=None, init=False)

    def save(self, iteration: int, samples: int, tokens: int, *, last: bool = False) -> None:
        """Write `global_step<iteration>`, then move `latest`; with `background`, only begin to.

        last: the run ends with it, so it is waited for, and its failure is an error

        Raises SaveError when it failed and no further failure is allowed. Other errors are logged and counted.
        """
        if self._begun is not None:
            self._wait_for_the_one_before()
        self._begin(iteration, samples, tokens)
        if last or not self.background:
            self.finish(last=last)

    def poll(self) -> None:
        """At a step boundary: where all ranks have written their files, or one has failed, finish."""
        if self._begun is None:
            return
        writing, groups = self._begun.writing, self.engine.groups
        unfinished, failed = any_ranks([not writing.done, writing.failed], groups.world, self.engine.device)
        if failed:
            writing.abandon()
        if failed or not unfinished:
            self.finish()

    def finish(self, *, last: bool = False) -> None:
        """Wait for what is under way, if anything, and publish it.

        Raises SaveError as `save` does.
        """
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        world = self.engine.groups.world
        everyone = to_first_rank(begun.writing.wait(), world)
        problems, self.seconds = on_first_rank(partial(self._conclude, begun, everyone), world)
        if not problems:
            self.saved, self._in_a_row = begun.manifest.step, 0
            return
        self.failures += 1
        self._in_a_row += 1
        if last or self._in_a_row > self.failures_allowed:
            how_often = "" if last else f" ({self._in_a_row} in a row; checkpoint_failures_allowed: {self.failures_allowed})"
            what = f"the checkpoint of step {begun.manifest.step} was not saved{how_often}:\n" + "\n".join(
                f"    {line}" for line in problems
            )
            raise SaveError(what, where=str(self.directory), fix=_FIX)

    def abandon(self, error: BaseException) -> None:
        """The run ends by an exception: a single process finishes what is under way, several discard it. Does not raise.

        Other ranks may be gone, so nothing can be agreed.
        """
        begun = self._begun
        if begun is None:
            return
        if self.engine.groups.world.size == 1 and isinstance(error, Exception):
            try:
                self.finish()
            except Exception as failure:
                log.error("the checkpoint of step %d was lost with the run: %s", begun.manifest.step, failure)
            return
        self._begun = None
        begun.writing.abandon()
        begun.writing.wait()
        if self.engine.groups.world.rank == 0:
            shutil.rmtree(begun.writing.folder, ignore_errors=True)
            log.error("the checkpoint of step %d was still being written when the run failed: it is discarded", begun.manifest.step)

    def _wait_for_the_one_before(self) -> None:
        begun, since = self._begun, time.monotonic()
        self.finish()
        if begun is not None:
            log.info("waited %.1f s for the checkpoint of step %d, before the next", time.monotonic() - since, begun.manifest.step)

    def _begin(self, iteration: int, samples: int, tokens: int) -> None:
        since, world = time.monotonic(), self.engine.groups.world
        aside = f"{step_tag(iteration)}.{PARTIAL}"
        client_state = self._client_state(iteration, samples, tokens)
        writing = RankFileWriter(self.directory / aside, copies=self.background)
        if problem := on_first_rank(lambda: _made_empty(self.directory / aside), world):
            writing.fail(aside, problem)
        self.engine.save(self.directory, aside, client_state, writing)
        manifest = Manifest(
            step=iteration,
            files={},
            samples=samples,
            tokens=tokens,
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{"run_id": "", "layout": {}, "code_version": "", "config": {}, "data": {}, **self.about},
        )
        self._begun = _Begun(writing=writing, manifest=manifest, seconds=time.monotonic() - since)

    def _client_state(self, iteration: int, samples: int, tokens: int) -> dict[str, Any]:
        client_state: dict[str, Any] = {"iteration": iteration, "args": dict(self.compared)}
        client_state[OURS] = {"samples": samples, "tokens": tokens, "kept": dict(self.kept()), "optimizer": self.optimizer}
        if self.forward is not None:
            client_state[STORED] = self.forward()
        if self.rng:
            # Only the first data rank writes its client state.
            states = of_all_ranks(capture_rng(), self.engine.groups.replicas)
            client_state.update(states[0])
            client_state[OURS].update({RNG: states} if len(states) > 1 else {})
        return client_state

    def _conclude(self, begun: _Begun, everyone: Sequence[WrittenFiles]) -> tuple[list[str], float | None]:
        """On the first rank: publish, or clear away. Gives the problems, and the seconds of the last checkpoint that is complete."""
        since, aside = time.monotonic(), begun.writing.folder
        problems = [f"rank {rank}: {line}" for rank, written in enumerate(everyone) for line in written.problems]
        try:
            if not problems:
                self._publish(begun, {name: entry for written in everyone for name, entry in written.files.items()})
                seconds = max(begun.seconds, *(written.seconds for written in everyone)) + time.monotonic() - since
                return [], seconds
        except Exception as error:  # whatever it is, the other ranks are told: they wait for the outcome
            problems = [f"rank 0: {aside.name}: {error}"]
        shutil.rmtree(aside, ignore_errors=True)
        log.error("the checkpoint of step %d was not saved:\n%s", begun.manifest.step, "\n".join(f"    {line}" for line in problems))
        return problems, self.seconds

    def _publish(self, begun: _Begun, files: Mapping[str, Any]) -> None:
        aside, final = begun.writing.folder, self.directory / step_tag(begun.manifest.step)
        fault_injection.point("manifest")
        write_configs(aside, self.configs)
        complete_folder(aside, replace(begun.manifest, files=files))
        fault_injection.point("publish")
        publish(aside, final)
        fault_injection.point("latest")
        write_latest(self.directory, final.name)
        log.info("  successfully saved checkpoint at iteration %7d to %s", begun.manifest.step, final)
        if self.published is not None:
            self.published(final)
        if self.keep_last is not None:
            # The step just written stays even where an abandoned attempt left later ones.
            prune(self.directory, keep=self.keep_last, protected=self.protected | {begun.manifest.step}, every=self.keep_every)


def _made_empty(folder: Path) -> OSError | None:
    """Make a folder, without what a failed attempt left in it; gives the error where that cannot be done."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        return error
    return None
