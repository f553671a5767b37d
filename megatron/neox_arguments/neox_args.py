# SPDX-License-Identifier: Apache-2.0
"""NeoXArgs: the whole configuration, resolved, checked and frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.launch.environment import visible_devices
from megatron.provenance import git_commit

from .nested import check_block
from .problems import DEFAULT, ConfigProblems, Origin, unknown_key, value_problems
from .resolve import ResolutionState, model_ranks
from .resolvers import RESOLVERS, resolve_world
from .rules import RULES
from .sections import SECTION_OF, SECTIONS, Section
from .sections.data import DataArgs, ObjectiveArgs
from .sections.model import AttentionArgs, ModelArgs
from .sections.optim import OptimArgs
from .sections.outputs import CheckpointArgs, LogsArgs
from .sections.run import RunArgs, RuntimeArgs, TextArgs
from .unfinished import idle_keys
from .yaml_loader import Flat, add_overwrites, fold, from_mapping, read_files


@dataclass(frozen=True, kw_only=True)
class NeoXArgs:
    """The configuration of a run: ten frozen sections, derived values included.

    Made by `from_ymls` or `from_dict`, which raise one ConfigError with every problem there is.
    """

    runtime: RuntimeArgs
    model: ModelArgs
    attention: AttentionArgs
    optim: OptimArgs
    run: RunArgs
    data: DataArgs
    objective: ObjectiveArgs
    checkpoint: CheckpointArgs
    logs: LogsArgs
    text: TextArgs
    _given: Mapping[str, Any] = field(repr=False)
    _origins: Mapping[str, Origin] = field(repr=False, compare=False)

    @classmethod
    def from_ymls(cls, paths: Sequence[str | Path], overwrites: Mapping[str, Any] | None = None, conf_dir: str | None = None) -> NeoXArgs:
        """Read, merge and resolve config files.

        paths: config files, `.yml` appended where the name ends in none of .yml, .yaml, .json; joined to conf_dir
        overwrites: settings from the command line, which win over the files'
        """
        flat = read_files([str(path) for path in paths], conf_dir)
        add_overwrites(flat, overwrites)
        return cls._build(flat)

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> NeoXArgs:
        """Resolve settings that a program holds; the same rules as for files."""
        return cls._build(from_mapping(flat))

    def replace(self, **flat: Any) -> NeoXArgs:
        """The configuration with some settings changed, and everything derived derived anew."""
        changed = Flat(dict(self._given), dict(self._origins))
        for key, value in flat.items():
            changed.values[fold(key)] = value
            changed.origins[fold(key)] = Origin("replace")
        changed.origins = {key: origin for key, origin in changed.origins.items() if origin.kind not in ("derived", "default")}
        return self._build(changed)

    def to_flat(self) -> dict[str, Any]:
        """Every key with its resolved value, as plain python values; `from_dict` of it gives the same sections."""
        return {key: deepcopy(getattr(getattr(self, section), key)) for key, section in SECTION_OF.items()}

    def given(self) -> dict[str, Any]:
        """The keys that the user set, as the user set them (config_files included); `from_dict` of it resolves them anew."""
        return deepcopy(dict(self._given))

    def origin(self, key: str) -> Origin:
        """Where the value of a key, or of a dotted entry of a block (`optimizer.params.lr`), came from."""
        name = fold(key)
        if name.partition(".")[0] not in SECTION_OF:
            raise ConfigProblems([unknown_key(name, None)])
        while name not in self._origins and "." in name:
            name = name.rpartition(".")[0]
        return self._origins.get(name, DEFAULT)

    @property
    def data_parallel_size(self) -> int:
        """Over how many ranks samples are spread: ranks / pipeline stages / tensor-parallel ranks / context-parallel ranks."""
        return (self.runtime.global_num_gpus or 1) // model_ranks(vars(self.runtime))

    @property
    def config_files(self) -> dict[str, str]:
        """Text of the config files by name; empty when none was read."""
        return dict(self.checkpoint.config_files or {})

    def ignored_keys(self) -> tuple[str, ...]:
        """Keys the user set that do nothing, for one warning line."""
        return idle_keys(self._given, self.run, self.runtime)

    def __getattr__(self, name: str) -> Any:
        """Read-only flat view for outside users: `args.hidden_size`."""
        section = SECTION_OF.get(name)
        if section is None:
            raise AttributeError(f"NeoXArgs has no key {name}")
        return getattr(getattr(self, section), name)

    @classmethod
    def _build(cls, flat: Flat) -> NeoXArgs:
        if flat.files:
            flat.values.setdefault("config_files", flat.files)
        state = _read(flat)
        if any(not problem.keys for problem in flat.problems):
            # A file that could not be read says nothing of what it would have set.
            raise ConfigProblems(state.problems)
        environ = dict(os.environ)
        resolve_world(state, environ, visible_devices(environ))
        for resolve in RESOLVERS:
            resolve(state)
        if state["git_hash"] is None:
            state.derive("git_hash", (git_commit(Path(__file__).resolve().parents[2]) or "")[:9] or None, "the repository")
        sections = _sections(state)
        for problem in (problem for rule in RULES for problem in rule.broken(state.values, state.bad)):
            state.note(problem, spoils=False)
        if state.problems:
            raise ConfigProblems(state.problems)
        origins = {
            key: origin for key, origin in flat.origins.items() if flat.values.get(key.partition(".")[0].partition("[")[0]) is not None
        }
        origins |= {key: Origin("derived", detail=source) for key, source in state.sources.items() if source != "default"}
        return cls(**sections, _given=flat.values, _origins=origins)


def _read(flat: Flat) -> ResolutionState:
    """Values of all keys as far as each is right by itself; unknown keys and wrong values become problems."""
    state = ResolutionState({}, frozenset(), flat.origins, files=tuple(flat.files))
    for problem in flat.problems:
        state.note(problem)
    state.bad.clear()
    autotuning = flat.values.get("autotuning")
    relaxed = isinstance(autotuning, dict) and bool(autotuning.get("enabled"))
    given: dict[str, Any] = {}
    for key, value in flat.values.items():
        if key not in SECTION_OF:
            state.note(unknown_key(key, state.place((key,))))
        elif isinstance(value, dict):
            given[key], problems = check_block(key, value, relaxed=relaxed)
            for problem in problems:
                state.note(problem)
        elif not (relaxed and value == "auto"):
            given[key] = value
    for name, section in SECTIONS.items():
        state.values |= _valid_values(state, section, {key: value for key, value in given.items() if SECTION_OF[key] == name})
    state.given = frozenset(key for key in given if state.values[key] is not None and key not in state.bad)
    return state


def _valid_values(state: ResolutionState, section: type[Section], given: dict[str, Any]) -> dict[str, Any]:
    """The section's values; a value that is not allowed is reported and its default stands in."""
    try:
        made = section.model_validate(given)
    except ValidationError as error:
        for problem in value_problems(section, error, given):
            state.note(problem)
        made = section.model_validate({key: value for key, value in given.items() if key not in state.bad})
    return {key: getattr(made, key) for key in section.model_fields}


def _sections(state: ResolutionState) -> dict[str, Any]:
    """The frozen sections of a resolution state; a derived value out of bounds is a problem too."""
    made: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values = {key: state[key] for key in section.model_fields}
        try:
            made[name] = section.model_validate(values)
        except ValidationError as error:
            for problem in value_problems(section, error, values):
                state.note(problem)
    return made
