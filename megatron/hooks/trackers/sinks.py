# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, Weights & Biases and Comet behind one protocol."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from megatron.errors import BackendError
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)

_EXTRAS = MappingProxyType({"wandb": "wandb", "comet_ml": "comet", "tensorboard": "dev"})


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
        if self._sink is None:
            return
        try:
            self._sink.write(values, step)
        except Exception as error:  # a tracker's failure, whatever it is, must not end a training run
            self._drop(error)

    def close(self, *, failed: bool = False) -> None:
        """Close, or say why not."""
        if self._sink is None:
            return
        try:
            self._sink.close(failed=failed)
        except Exception as error:  # as above
            self._drop(error)
        self._sink = None

    def _drop(self, error: Exception) -> None:
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


@dataclass(frozen=True, kw_only=True)
class WandbSpec:
    """A W&B run. `run_id` is kept in checkpoints so that a resumed run goes on in the same run."""

    run_id: str
    project: str
    group: str | None = None
    name: str | None = None
    team: str | None = None
    host: str | None = None
    directory: Path | None = None


class WandbSink:
    """A W&B run, online or (WANDB_MODE=offline) in a local folder."""

    def __init__(self, spec: WandbSpec, *, config: Mapping[str, Any]) -> None:
        import wandb

        settings: dict[str, Any] = {"save_code": False}
        if spec.host and "WANDB_BASE_URL" not in os.environ:
            settings["base_url"] = spec.host
        if spec.directory is not None:
            spec.directory.mkdir(parents=True, exist_ok=True)
        self._teardown: Any = wandb.teardown
        self._run: Any = wandb.init(
            id=spec.run_id,
            resume="allow",
            project=spec.project,
            group=spec.group,
            name=spec.name,
            entity=spec.team,
            dir=None if "WANDB_DIR" in os.environ or spec.directory is None else str(spec.directory),
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


@dataclass(frozen=True, kw_only=True)
class CometSpec:
    """A Comet experiment. `key` is kept in checkpoints; `resumed` tells whether it exists already."""

    key: str
    resumed: bool
    workspace: str | None = None
    project: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None


class CometSink:
    """A Comet experiment; without COMET_API_KEY an offline one, as an archive in `directory`."""

    def __init__(self, spec: CometSpec, *, config: Mapping[str, Any]) -> None:
        import comet_ml

        online = bool(os.environ.get("COMET_API_KEY"))
        kind = ("Existing" if spec.resumed else "") + ("" if online else "Offline") + "Experiment"
        kwargs: dict[str, Any] = {"previous_experiment" if spec.resumed else "experiment_key": spec.key}
        kwargs.update(log_code=False, log_git_patch=False, auto_metric_logging=False)
        if not online and spec.directory is not None:
            spec.directory.mkdir(parents=True, exist_ok=True)
            kwargs["offline_directory"] = str(spec.directory)
        if not spec.resumed:
            kwargs.update(workspace=spec.workspace, project_name=spec.project)
        self._experiment: Any = getattr(comet_ml, kind)(**kwargs)
        if spec.name:
            self._experiment.set_name(spec.name)
        if spec.tags:
            self._experiment.add_tags(list(spec.tags))
        if spec.others:
            self._experiment.log_others(dict(spec.others))
        self._experiment.log_parameters({key: json.dumps(value, default=str) for key, value in config.items()})

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One metric per name."""
        self._experiment.log_metrics(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        """End the experiment."""
        self._experiment.end()
