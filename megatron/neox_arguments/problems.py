# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a configuration, where a value came from, and type errors told in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron.errors import ConfigError

from .sections import SECTION_OF, Section, accepts_null, allowed
from .sections.base import literal_choices


@dataclass(frozen=True)
class Origin:
    """Where a value came from.

    kind: file | flag | from_dict | replace | default | derived
    file, line: set for kind file, line counted from 1
    detail: the flag for kind flag, what it was derived from for kind derived
    """

    kind: str
    file: str | None = None
    line: int | None = None
    detail: str | None = None

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.file}:{self.line}"
        if self.kind == "flag":
            return self.detail or "command line"
        if self.kind == "derived":
            return f"derived from {self.detail}" if self.detail else "derived"
        return self.kind


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    what:    one sentence
    where:   file:line, flag or from_dict; several joined by `, `
    allowed: what may be written instead
    closest: the nearest valid spelling, if one is near
    fix:    what the user does about it
    keys:    the keys it is about
    """

    what: str
    where: str | None = None
    allowed: str | None = None
    closest: str | None = None
    fix: str | None = None
    keys: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The problem as shown to the user, the first line being what is wrong."""
        rows = (("where", self.where), ("allowed", self.allowed), ("closest", self.closest), ("fix", self.fix))
        return [self.what, *(f"  {name + ':':<9}{text}" for name, text in rows if text)]


class ConfigProblems(ConfigError):
    """All problems of one configuration in one error.

    `what` names the first problem (or how many there are); `problems` holds them all; `report()` shows them all.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        what = first.what if len(self.problems) == 1 else f"{len(self.problems)} problems in the configuration"
        super().__init__(what, where=first.where, fix=first.fix)

    def report(self) -> str:
        """Every problem with what, where, allowed, closest and fix."""
        if len(self.problems) == 1:
            return "\n".join(self.problems[0].lines())
        parts = [f"{len(self.problems)} problems in the configuration:"]
        for number, problem in enumerate(self.problems, start=1):
            first, *rest = problem.lines()
            parts += [f"{number}. {first}", *(f"  {line}" for line in rest)]
        return "\n".join(parts)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, whatever its case; None when nothing is near."""
    by_fold = {other.lower(): other for other in known}
    found = get_close_matches(name.lower(), by_fold, n=1, cutoff=0.6)
    return by_fold[found[0]] if found else None


def shown(value: Any) -> str:
    """A value as in YAML flow style, shortened for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if isinstance(value, str | int | float | list | dict) else f"{type(value).__name__} object"
    return text if len(text) <= 80 else text[:77] + "..."


def plain(number: float) -> str:
    """A number without a needless fraction or exponent: 2.0 -> 2, 0.001 -> 0.001."""
    return str(int(number)) if float(number).is_integer() and abs(number) < 1e15 else f"{number:g}"


# Names of older configs and of other frameworks that nearness alone would not lead to the right key.
OTHER_NAMES: Final = MappingProxyType(
    {
        "gas": "gradient_accumulation_steps",
        "micro_batch_size": "train_micro_batch_size_per_gpu",
        "global_batch_size": "train_batch_size",
        "learning_rate": "lr",
        "tensor_model_parallel_size": "model_parallel_size",
        "pipeline_model_parallel_size": "pipe_parallel_size",
        "num_key_value_heads": "num_kv_heads",
        "num_query_groups": "num_kv_heads",
        "rope_theta": "rotary_emb_base",
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "rms_norm_epsilon",
        "layer_norm_eps": "layernorm_epsilon",
    }
)


def unknown_key(key: str, where: str | None) -> Problem:
    """A key that no section has."""
    near = OTHER_NAMES.get(key) or closest(key, SECTION_OF)
    fix = f"write {near}, or remove it" if near else "remove it; `python -m megatron.neox_arguments document` lists all keys"
    return Problem(f"{key} is not a known key", where=where, closest=near, fix=fix, keys=(key,))


def value_problems(section: type[Section], error: ValidationError, values: Mapping[str, Any]) -> list[Problem]:
    """One problem per key whose value is not allowed by itself."""
    details: dict[str, list[tuple[Any, ...]]] = {}
    for item in error.errors(include_url=False, include_context=False):
        details.setdefault(str(item["loc"][0]), []).append(item["loc"][1:])
    return [_value_problem(key, values.get(key), section.model_fields[key], places) for key, places in details.items()]


def _value_problem(key: str, value: Any, field: FieldInfo, places: list[tuple[Any, ...]]) -> Problem:
    if field.annotation is type(None):
        return Problem(f"{key} is filled in at run time and cannot be set", allowed="nothing", fix="remove it", keys=(key,))
    near = closest(value, literal_choices(field.annotation)) if isinstance(value, str) else None
    element = next((part for place in places for part in place if isinstance(part, int)), None)
    what = f"{key} is {shown(value)}"
    if element is not None and isinstance(value, list) and element < len(value):
        what += f", of which entry {element + 1}, {shown(value[element])}, does not fit"
    return Problem(what, allowed=allowed(field), closest=near, fix=_fix_for(key, value, field, near), keys=(key,))


def _fix_for(key: str, value: Any, field: FieldInfo, near: str | None) -> str:
    kinds = allowed(field)
    if near:
        return f"write {near}"
    if value is None:
        return "leave the key out to use its default"
    if isinstance(value, str) and _is_number(value) and "number" in kinds:
        return "write the number without quotes"
    if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off") and "true or false" in kinds:
        return f"write {value.lower()} without quotes"
    if not isinstance(value, list | dict) and "a list of" in kinds:
        return f"write a list: [{value}]"
    if isinstance(value, bool | int | float) and kinds.startswith("a string"):
        return f'put it in quotes: "{shown(value)}"'
    if isinstance(value, bool) and "number" in kinds:
        return "write a number, not true or false"
    choices = literal_choices(field.annotation)
    if choices:
        return f"write one of {', '.join(choices)}"
    return f"write {kinds.removesuffix(', or null')}" + (", or leave the key out" if accepts_null(field) else "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
