# SPDX-License-Identifier: Apache-2.0
"""pydantic's findings and unknown names -> problems in our words. Knows no relation between keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .problems import Problem, closest, shown
from .sections import SECTION_OF, Section, accepts_null, allowed
from .sections.base import literal_choices

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
