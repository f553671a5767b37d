# SPDX-License-Identifier: Apache-2.0
"""YAML and JSON files -> one flat dict in which every value knows its file and line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .problems import Origin, Problem, closest


@dataclass
class Flat:
    """Merged settings while they are being read.

    values:  key -> value, keys with underscores
    origins: key, and dotted path of nested keys (`optimizer.params.lr`) -> where it stands
    files:   basename -> raw text of every file read
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, what: str, where: object, fix: str, *keys: str, closest: str | None = None) -> None:
        """Note a problem about `keys`."""
        self.problems.append(Problem(what, where=str(where), closest=closest, fix=fix, keys=keys))


class ConfigLoader(yaml.SafeLoader):
    """SafeLoader whose numbers are those people mean.

    1e-4 and 5e8 are numbers (YAML 1.2), 1:30 and 2024-01-01 are strings; yes, no, on, off stay booleans as in YAML 1.1,
    because existing configs use them.
    """


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """First character -> [(tag, pattern)], the implicit types of YAML 1.1 with the numbers of YAML 1.2."""
    dropped = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {
        first: [(tag, pattern) for tag, pattern in rows if tag not in dropped]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    whole = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)$")
    real = re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    for first in "-+0123456789":
        table.setdefault(first, []).append(("tag:yaml.org,2002:int", whole))
    for first in "-+.0123456789":
        table.setdefault(first, []).append(("tag:yaml.org,2002:float", real))
    return table


def _whole(loader: ConfigLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _real(loader: ConfigLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


ConfigLoader.yaml_implicit_resolvers = _resolvers()
ConfigLoader.add_constructor("tag:yaml.org,2002:int", _whole)
ConfigLoader.add_constructor("tag:yaml.org,2002:float", _real)


def scalar(text: str) -> Any:
    """One value as it would be read from a config file; a string when it is not valid YAML.

    >>> scalar("1e-4"), scalar("[1, 2]"), scalar("true"), scalar("a: b: c")
    (0.0001, [1, 2], True, 'a: b: c')
    """
    try:
        return yaml.load(text, Loader=ConfigLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError):
        return text


def fold(key: str) -> str:
    """The one spelling of a key: underscores."""
    return key.replace("-", "_")


def config_path(name: str, conf_dir: str | None = None) -> Path:
    """The file a config argument means: joined to conf_dir, `.yml` appended unless it ends in .yml, .yaml or .json."""
    path = Path(conf_dir) / name if conf_dir else Path(name)
    return path if path.suffix in (".yml", ".yaml", ".json") else path.with_name(path.name + ".yml")


def read_files(paths: Sequence[str], conf_dir: str | None = None) -> Flat:
    """Read and merge config files; whatever is wrong with them is collected in `.problems`, nothing is raised."""
    flat = Flat()
    seen: dict[str, Path] = {}
    for path in (config_path(str(name), conf_dir) for name in paths):
        if path.name in seen:
            fix = "rename one: copies of both are kept side by side in every checkpoint"
            flat.refuse(f"two config files are called {path.name}", f"{seen[path.name]}, {path}", fix)
            continue
        seen[path.name] = path
        text = _text(path, flat)
        if text is not None:
            flat.files[path.name] = text
            read_text(text, str(path), flat)
    return flat


def read_text(text: str, name: str, flat: Flat) -> None:
    """Add the settings of one file's text to `flat`."""
    try:
        loader = ConfigLoader(text)
        try:
            node = loader.get_single_node()
            if node is None or node.tag == "tag:yaml.org,2002:null":
                return
            if not isinstance(node, yaml.MappingNode):
                where, fix = f"{name}:{node.start_mark.line + 1}", 'write `key: value`, one pair per line, or { "key": value, ... }'
                flat.refuse("a config file holds `key: value` pairs, this one does not", where, fix)
                return
            _add_mapping(loader, node, name, flat)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        cause = error.problem or error.context or "syntax error"
        flat.refuse(f"not valid YAML: {cause}", f"{name}:{mark.line + 1 if mark else 1}", _syntax_fix(cause))
    except (yaml.YAMLError, ValueError) as error:
        flat.refuse(f"not readable as YAML: {error}", f"{name}:1", "save the file as UTF-8 text")


def _text(path: Path, flat: Flat) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        names = [other.name for other in path.parent.iterdir() if other.is_file()] if path.parent.is_dir() else []
        near = closest(path.name, names)
        fix = "give the path of a .yml, .yaml or .json file; other names get .yml appended"
        flat.refuse(f"cannot read the config file: {error.strerror}", path, fix, closest=str(path.parent / near) if near else None)
    except UnicodeDecodeError as error:
        flat.refuse(f"the config file is not UTF-8 text: {error.reason}", path, "save it as UTF-8")
    return None


def _syntax_fix(cause: str) -> str:
    hints = {
        "\\t": "indent with spaces, not tabs",
        "expected ',' or": "put a comma between the entries, and close every bracket that is open",
        "mapping values are not allowed": "put one `key: value` per line, and quote values that hold `: `",
        "single document": "keep one document per file: remove the `---` line",
        "another document": "keep one document per file: remove the `---` line",
    }
    return next((fix for words, fix in hints.items() if words in cause), "correct the line, or the one before it")


def _add_mapping(loader: ConfigLoader, node: yaml.MappingNode, name: str, flat: Flat) -> None:
    """Add the top-level pairs of a file: keys folded, duplicates in this or an earlier file refused."""
    for key_node, value_node in node.value:
        here = Origin("file", name, key_node.start_mark.line + 1)
        if key_node.tag == "tag:yaml.org,2002:merge":
            flat.refuse("`<<` does not work at the top of a config", here, "write the keys out")
            continue
        raw = loader.construct_object(key_node, deep=True)
        if not isinstance(raw, str):
            flat.refuse(f"a key is a name, {raw!r} is none", here, "write `name: value`")
            continue
        key = fold(raw)
        _note_nested(value_node, key, name, flat, frozenset())
        if key in flat.values:
            fix = "keep one of the two; `-` and `_` in a key are the same"
            flat.refuse(f"{key} is set twice", f"{flat.origins[key]}, {here}", fix, key)
            continue
        flat.values[key] = loader.construct_object(value_node, deep=True)
        flat.origins[key] = here


def _note_nested(node: yaml.Node, path: str, name: str, flat: Flat, above: frozenset[int]) -> None:
    """Note the line of every key inside `node` under its dotted path and refuse repeated ones."""
    if id(node) in above:
        return
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_nested(item, f"{path}[{index}]", name, flat, above)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, Origin] = {}
    for key_node, value_node in node.value:
        inner = f"{path}.{key_node.value}"
        here = Origin("file", name, key_node.start_mark.line + 1)
        if inner in lines and key_node.tag != "tag:yaml.org,2002:merge":
            flat.refuse(f"{inner} is set twice", f"{lines[inner]}, {here}", "keep one of the two", path)
        lines[inner] = here
        flat.origins.setdefault(inner, here)
        _note_nested(value_node, inner, name, flat, above)


def add_overwrites(flat: Flat, overwrites: Mapping[str, Any] | None) -> None:
    """Put command-line settings over those of the files."""
    for raw, value in (overwrites or {}).items():
        key = fold(raw)
        flat.values[key] = value
        for stale in [path for path in flat.origins if path == key or path.startswith((f"{key}.", f"{key}["))]:
            del flat.origins[stale]
        flat.origins[key] = Origin("flag", detail=f"--{key}")


def from_mapping(values: Mapping[str, Any]) -> Flat:
    """Settings that come from a program instead of files."""
    flat = Flat()
    for raw, value in values.items():
        key = fold(str(raw))
        if key in flat.values:
            flat.refuse(f"{key} is set twice", "from_dict", "keep one of `-` and `_`", key)
        flat.values[key] = value
        flat.origins[key] = Origin("from_dict")
    return flat
