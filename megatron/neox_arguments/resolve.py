# SPDX-License-Identifier: Apache-2.0
"""What resolving works with: the state of a configuration under way, and the arithmetic of derived values as pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from .problems import Origin, Problem, closest, shown

LAYER_TYPES: Final = (
    "global", "local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer", "gmlp", "amlp", "flash", "rwkv", "mamba",
)  # fmt: skip

TRIPLE: Final = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class Unsolvable(ValueError):
    """Values that cannot be brought together; `fix` says what would."""

    def __init__(self, what: str, fix: str, *, allowed: str | None = None, closest: str | None = None) -> None:
        super().__init__(what)
        self.problem = Problem(what, fix=fix, allowed=allowed, closest=closest)


def model_ranks(values: Mapping[str, Any]) -> int:
    """Ranks that share one copy of the model: pipeline stages * tensor-parallel ranks * context-parallel ranks."""
    return int(max(values["pipe_parallel_size"], 1) * values["model_parallel_size"] * values["context_parallel_size"])


def batch_triple(train: int | None, micro: int | None, accumulation: int | None, ranks: int) -> tuple[int, int, int]:
    """(train, micro, accumulation) with train = micro * accumulation * ranks, from any one or two of them.

    A micro batch or a train batch alone accumulates over 1 step, accumulation alone takes 1 sample. Raises Unsolvable.

    >>> batch_triple(8, 2, None, 1), batch_triple(None, None, 4, 2)
    ((8, 2, 4), (8, 1, 4))
    """
    names = dict(zip(TRIPLE, (train, micro, accumulation), strict=True))
    if train is None:
        if micro is None and accumulation is None:
            raise Unsolvable("no batch size is set", f"set one or two of {', '.join(TRIPLE)}")
        micro, accumulation = micro or 1, accumulation or 1
        return micro * accumulation * ranks, micro, accumulation
    if micro is None and accumulation is None:
        accumulation = 1
    if micro is None or accumulation is None:
        missing = TRIPLE[1] if micro is None else TRIPLE[2]
        known = (accumulation if micro is None else micro) or 1
        found, rest = divmod(train, known * ranks)
        if rest or not found:
            parts = " * ".join(f"{name} {value}" for name, value in names.items() if value is not None and name != TRIPLE[0])
            divisor = f"{parts + ' * ' if parts else ''}{ranks} data-parallel ranks = {known * ranks}"
            raise Unsolvable(
                f"{missing} has no whole solution: train_batch_size {train} / ({divisor}) = {train / (known * ranks):.4g}",
                f"make train_batch_size a multiple of {known * ranks}, such as {max(1, round(train / (known * ranks))) * known * ranks}",
            )
        return (train, found, accumulation) if micro is None else (train, micro, found)  # type: ignore[return-value]
    if train != micro * accumulation * ranks:
        raise Unsolvable(
            f"train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} * gradient_accumulation_steps {accumulation}"
            f" * {ranks} data-parallel ranks = {micro * accumulation * ranks}",
            "leave one of the three out: it is solved for",
        )
    return train, micro, accumulation


def expand_attention(config: list[Any] | None, num_layers: int) -> list[str]:
    """One layer type per layer from [[[type, ...], repeats], ...] or a list of types. Raises Unsolvable.

    repeats "all" fills what the items before it left.

    >>> expand_attention([[["global"], 1], [["flash", "local"], "all"]], 5)
    ['global', 'flash', 'local', 'flash', 'local']
    """
    if config is None:
        return ["global"] * num_layers
    form = 'write [[["global"], 12]], or one name per layer'
    layers: list[str] = []
    if all(isinstance(item, str) for item in config):
        layers = list(config)
    else:
        for item in config:
            if not (isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], list | tuple) and item[0]):
                raise Unsolvable(f"attention_config item {shown(item)} is not [[type, ...], repeats]", form)
            types, repeats = list(item[0]), item[1]
            left = num_layers - len(layers)
            if isinstance(repeats, str) and repeats.lower() == "all":
                if left % len(types) or left <= 0:
                    raise Unsolvable(
                        f"attention_config repeats {len(types)} types over all {left} layers left: {left} / {len(types)} is not whole",
                        "change num_layers or the number of types",
                    )
                repeats = left // len(types)
            if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
                raise Unsolvable(f"attention_config repeats a pattern {shown(repeats)} times", form, allowed="a whole number, or all")
            layers += types * repeats
    return _checked_layers(layers, num_layers)


def _checked_layers(layers: list[Any], num_layers: int) -> list[str]:
    lower = [name.lower() if isinstance(name, str) else name for name in layers]
    for name in lower:
        if name not in LAYER_TYPES:
            near = closest(str(name), LAYER_TYPES)
            raise Unsolvable(
                f"attention_config names the layer type {shown(name)}",
                f"write {near}" if near else "use a layer type that exists",
                allowed="one of " + ", ".join(LAYER_TYPES),
                closest=near,
            )
    if len(lower) != num_layers:
        raise Unsolvable(
            f"attention_config describes {len(lower)} layers, num_layers is {num_layers}",
            "make the repeats add up to num_layers, or use 'all' as the last repeat",
        )
    return lower


def decay_iters(lr_decay_iters: int | None, fraction: float | None, train_iters: int | None) -> int | None:
    """Length of the schedule in steps; None while the number of steps is unknown (train_epochs)."""
    if lr_decay_iters is not None:
        return lr_decay_iters
    return None if train_iters is None else max(1, math.floor(train_iters * (1.0 if fraction is None else fraction)))


def feed_forward_width(
    hidden: int, intermediate: int | None, expansion: float | None, *, multiple_of: int, gated: bool, literal: bool
) -> int:
    """Columns of a feed-forward sublayer's second matrix.

    FORMAT: without a gate: intermediate_size, else expansion_factor * h, else 4 h, rounded up to mlp_multiple_of.
    With a gate: two thirds of that over two matrices, int(w * 2 / 3) // 2 rounded up; but an explicit intermediate_size
    is the width itself under the literal convention.

    >>> feed_forward_width(64, None, None, multiple_of=8, gated=True, literal=False)
    88
    """
    wide = intermediate or int((expansion or 4) * hidden)
    if gated:
        if intermediate and literal:
            return intermediate
        wide = int(wide * 2 / 3) // 2
    return -(-wide // multiple_of) * multiple_of


def choose_precision(precision: str | None, fp16: Mapping[str, Any], bf16: Mapping[str, Any]) -> str:
    """fp32, fp16 or bfloat16 from the key and the two blocks. Raises Unsolvable when they disagree."""
    votes = {"precision": precision} if precision else {}
    if fp16.get("enabled"):
        votes["fp16.enabled"] = "fp16"
    if bf16.get("enabled"):
        votes["bf16.enabled"] = "bfloat16"
    if len(set(votes.values())) > 1:
        said = ", ".join(f"{key} says {value}" for key, value in votes.items())
        raise Unsolvable(f"the precision is contradictory: {said}", "keep one of them")
    return next(iter(votes.values()), "fp32")


def parse_split(text: str) -> tuple[float, float, float] | None:
    """Three shares from `969, 30, 1`, `969/30/1` or `1`; None when the text is something else.

    >>> parse_split("969, 30, 1"), parse_split("100"), parse_split("a")
    ((969.0, 30.0, 1.0), (100.0, 0.0, 0.0), None)
    """
    try:
        shares = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        return None
    if len(shares) > 3 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        return None
    first, second, third = (*shares, 0.0, 0.0)[:3]
    return first, second, third


@dataclass
class ResolutionState:
    """Values of all keys on their way to the frozen sections.

    values:  key -> value, defaults filled in
    given:   keys that the user set to something other than null
    origins: key or dotted path -> where the user set it
    files:   names of the config files, to place what is missing
    bad:     keys and dotted paths already known to be wrong; later findings about them are only noise
    sources: derived key -> what it was derived from
    """

    values: dict[str, Any]
    given: frozenset[str]
    origins: Mapping[str, Origin]
    files: tuple[str, ...] = ()
    bad: set[str] = field(default_factory=set)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def derive(self, key: str, value: Any, source: str) -> None:
        """Set a key to what follows from others; a key the user gave keeps its origin even where its value is completed."""
        if key not in self.given:
            self.sources[key] = source
        self.values[key] = value

    def refuse(self, what: str, fix: str, *keys: str, allowed: str | None = None, closest: str | None = None) -> None:
        """Note a problem about `keys`."""
        self.note(Problem(what, allowed=allowed, closest=closest, fix=fix, keys=keys))

    def note(self, problem: Problem, *, spoils: bool = True) -> None:
        """Note a problem, in its place, unless it follows from one already noted.

        spoils: whether what is found later about the same keys is taken to follow from this problem
        """
        if not self.bad.intersection(problem.keys):
            self.problems.append(problem if problem.where else replace(problem, where=self.place(problem.keys)))
            if spoils:
                self.bad.update(problem.keys)

    def place(self, keys: tuple[str, ...]) -> str | None:
        """The places where `keys` are set, or the files where one could be."""
        # A derived key has no place of its own: what it was derived from has.
        sought = [(key, *self.sources.get(key, "").split(", ")) for key in keys]
        found = [str(self.origins[path]) for names in sought for path in [next(filter(None, map(self._set_path, names)), None)] if path]
        return ", ".join(dict.fromkeys(found)) or ", ".join(self.files) or None

    def _set_path(self, key: str) -> str | None:
        """`key`, or the nearest block around it, as far as the user set one."""
        while key not in self.origins:
            key, dot, _ = key.rpartition(".")
            if not dot:
                return None
        return key

    def agree(self, key: str, path: str, inner: Any) -> Any:
        """The common value of a key and of its twin inside a block (`path`); refused when both are set and differ."""
        if key not in self.given:
            return inner
        outer = self.values[key]
        if inner is None or inner == outer:
            return outer
        fix = f"set one of the two; {path} is enough" if "." in path else "set one of the two, or both alike"
        self.refuse(f"{key} is {shown(outer)}, but {path} is {shown(inner)}", fix, key, path)
        return inner
