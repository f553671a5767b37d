# SPDX-License-Identifier: Apache-2.0
"""What all configuration sections share: frozen, closed, strict fields, declared by `key`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

# Marks for `json_schema_extra`: who fills the key in, and whether it does anything.
NO_EFFECT: JsonDict = {"effect": "none"}
DERIVED: JsonDict = {"set_by": "derived"}
RUNTIME: JsonDict = {"set_by": "run time"}


def _whole(value: Any) -> Any:
    """5e8 is a float to YAML and 500000000 to its writer: a float without a fraction counts as an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Block = dict[str, Any] | None


def key(default: Any, description: str, mark: JsonDict | None = None, **bounds: Any) -> Any:
    """A key of a section.

    mark:   NO_EFFECT, DERIVED or RUNTIME
    bounds: ge, gt, le, lt
    """
    return Field(default, description=description, json_schema_extra=mark, **bounds)


def literal_choices(annotation: Any) -> tuple[str, ...]:
    """The strings a field may take, in canonical case; empty when the field is no choice."""
    if get_origin(annotation) is Literal:
        return tuple(value for value in get_args(annotation) if isinstance(value, str))
    return tuple(choice for part in get_args(annotation) for choice in literal_choices(part))


class Section(BaseModel):
    """A group of keys. The field name is the YAML key; names are unique over all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True)

    choices: ClassVar[dict[str, dict[str, str]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Note once per class which keys are choices: lower case -> canonical case."""
        super().__pydantic_init_subclass__(**kwargs)
        named = {key: literal_choices(field.annotation) for key, field in cls.model_fields.items()}
        cls.choices = {key: {name.lower(): name for name in names} for key, names in named.items() if names}

    @model_validator(mode="before")
    @classmethod
    def _canonical(cls, data: Any) -> Any:
        """Bring choices to their canonical case and read `None`, as Python spells it, as null."""
        if not isinstance(data, dict):
            return data
        return {key: cls.canonical(key, value) for key, value in data.items()}

    @classmethod
    def canonical(cls, key: str, value: Any) -> Any:
        """One value as the field wants it; what cannot be brought there is handed back for the type check to refuse."""
        if value is False:
            # An `off` without quotes is a truth value to YAML.
            return cls.choices.get(key, {}).get("off", value)
        if not isinstance(value, str):
            return value
        found = cls.choices.get(key, {}).get(value.lower())
        if found is not None:
            return found
        return None if value == "None" else value


def allowed(field: FieldInfo) -> str:
    """A field's type, bounds and choices in words: `a whole number >= 1, or null`."""
    words = _type_words(field.annotation)
    bounds = [text for item in field.metadata for text in _bound_words(item)]
    if bounds:
        words[0] = f"{words[0]} {' and '.join(bounds)}"
    return ", or ".join(words)


def accepts_null(field: FieldInfo) -> bool:
    """Whether null may be written for this field."""
    return field.annotation is type(None) or type(None) in get_args(field.annotation)


def _bound_words(item: Any) -> list[str]:
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    return [f"{sign} {getattr(item, name)}" for name, sign in signs if getattr(item, name, None) is not None]


_SCALARS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
    Any: "anything",
}


def _type_words(annotation: Any) -> list[str]:
    origin = get_origin(annotation)
    if annotation in _SCALARS:
        return [_SCALARS[annotation]]
    if origin is Annotated:
        return _type_words(get_args(annotation)[0])
    if origin is Literal:
        return ["one of " + ", ".join(str(value) for value in get_args(annotation))]
    if origin is dict:
        return ["a mapping"]
    if origin is list:
        inner = _type_words(get_args(annotation)[0])[0] if get_args(annotation) else "anything"
        return [f"a list of {_PLURALS.get(inner, inner)}"]
    return [word for part in get_args(annotation) for word in _type_words(part)] or [str(annotation)]


_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "a string": "strings", "a list": "lists", "a mapping": "mappings"}
