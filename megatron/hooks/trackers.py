# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, Weights & Biases and Comet behind one protocol, and the ids of a run at them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol
from uuid import uuid4

from megatron.errors import BackendError
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)

_EXTRAS = MappingProxyType({"wandb": "wandb", "comet_ml": "comet", "tensorboard": "dev"})


KEPT = "tracker_ids"
"""Key under which checkpoints keep the ids."""


def tracker_ids(kept: Mapping[str, object]) -> dict[str, str]:
    """Ids of the run at its trackers: those kept in the checkpoint it resumed from, else new ones."""
    saved = kept.get(KEPT)
    known = {str(key): str(value) for key, value in saved.items()} if isinstance(saved, Mapping) else {}
    return {"wandb": uuid4().hex[:8], "comet": uuid4().hex, **known}


class Sink(Protocol):
    """Takes named numbers; x axis = iteration."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Record values of one iteration."""

    def close(self, *, failed: bool = False) -> None:
        """Send what is left. `failed` marks the run as crashed where the tracker knows such a thing."""


Opener = Callable[[int], Sink]
"""Opens a sink for a run that starts after the given iteration."""


class Guarded:
    """A sink that can fail without harming the run: it is dropped, with one warning."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self._sink: Sink | None = sink

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Record, or drop the sink."""
        self._attempt(lambda sink: sink.write(values, step))

    def close(self, *, failed: bool = False) -> None:
        """Close, or say why not."""
        self._attempt(lambda sink: sink.close(failed=failed))
        self._sink = None

    def _attempt(self, act: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            act(self._sink)
        except Exception as error:  # a tracker's failure, whatever it is, must not end a training run
            log.warning(f"{self.name} failed and gets no more metrics from this run (metrics.jsonl goes on): {redact(repr(error))}")
            self._sink = None


def require(package: str, *, where: str) -> None:
    """BackendError naming the extra when a requested tracker's package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise BackendError(
            f"the package {package!r} is not installed",
            where=where,
            fix=f'install it (uv pip install "megatron-neox[{_EXTRAS[package]}]" or {package}) or remove the key',
        )


class TensorBoardSink:
    """Event files in a folder; every argument is kept as text."""

    def __init__(self, directory: Path, *, config: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points a crashed run wrote after `start` are hidden.
        self._writer: Any = SummaryWriter(str(directory), purge_step=start + 1 if start else None)
        for key, value in config.items():
            self._writer.add_text(key, str(value), global_step=start)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """A W&B run, online or (WANDB_MODE=offline) in a local folder.

    run: what `wandb.init` is told of it; its `id` is kept in checkpoints so that a resumed run goes on in the same run
    """

    def __init__(
        self, run: Mapping[str, Any], *, config: Mapping[str, Any], host: str | None = None, directory: Path | None = None
    ) -> None:
        import wandb

        settings: dict[str, Any] = {"save_code": False}
        if host and "WANDB_BASE_URL" not in os.environ:
            settings["base_url"] = host
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._teardown: Any = wandb.teardown
        self._run: Any = wandb.init(
            **run,
            resume="allow",
            dir=None if "WANDB_DIR" in os.environ or directory is None else str(directory),
            config=dict(config),
            allow_val_change=True,
            settings=wandb.Settings(**settings),
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One history row; rows of the same iteration are merged."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        """Finish the run and wait until its file is whole: `finish` alone returns while the service still writes."""
        code = 1 if failed else 0
        self._run.finish(exit_code=code)
        self._teardown(exit_code=code)


def wandb_offline() -> bool:
    """Whether W&B needs no server, as its own environment variable says."""
    return os.environ.get("WANDB_MODE", "") in ("offline", "dryrun", "disabled")


def wandb_key_found(host: str) -> bool:
    """Whether a key for `host` is in the environment or in the netrc file; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    name = host.split("://")[-1].rstrip("/")
    return netrc.is_file() and name in netrc.read_text(encoding="utf-8", errors="replace").split()


class CometSink:
    """A Comet experiment; without COMET_API_KEY an offline one, as an archive in `directory`.

    experiment: what Comet's class is told of it; with `previous_experiment` it exists already
    others:     names and values that Comet shows beside the configuration
    """

    def __init__(
        self,
        experiment: Mapping[str, Any],
        *,
        config: Mapping[str, Any],
        name: str | None = None,
        tags: Sequence[str] = (),
        others: Mapping[str, Any] | None = None,
        directory: Path | None = None,
    ) -> None:
        import comet_ml

        online = bool(os.environ.get("COMET_API_KEY"))
        kind = ("Existing" if "previous_experiment" in experiment else "") + ("" if online else "Offline") + "Experiment"
        kwargs: dict[str, Any] = {**experiment, "log_code": False, "log_git_patch": False, "auto_metric_logging": False}
        if not online and directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            kwargs["offline_directory"] = str(directory)
        self._experiment: Any = getattr(comet_ml, kind)(**kwargs)
        if name:
            self._experiment.set_name(name)
        if tags:
            self._experiment.add_tags(list(tags))
        if others:
            self._experiment.log_others(dict(others))
        self._experiment.log_parameters({key: json.dumps(value, default=str) for key, value in config.items()})

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One metric per name."""
        self._experiment.log_metrics(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        """End the experiment."""
        self._experiment.end()
