# SPDX-License-Identifier: Apache-2.0
"""The files under requirements/ lie inside the ranges of pyproject.toml, and nothing in the base needs a GPU."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement

from support.tree import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings the same parser
    import tomli as tomllib

ONE_LINE = {"requirements.txt": "-e .", "requirements-dev.txt": "-e .[dev]"}
CONSTRAINTS = ("constraints.txt", "constraints-oldest.txt")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges() -> dict[str, Requirement]:
    """By name, whatever the base and the extras ask for; not the project's own extras."""
    table = project()
    lines = [*table["dependencies"], *(line for extra in table["optional-dependencies"].values() for line in extra)]
    return {r.name: r for r in map(Requirement, lines) if r.name != table["name"]}


def listed(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def pins(name: str) -> dict[str, list[str]]:
    """Name -> the exact versions (one for each range of Python versions)."""
    found: dict[str, list[str]] = {}
    for line in listed(name):
        pinned = Requirement(line)
        (pin,) = pinned.specifier
        assert pin.operator == "==", line
        found.setdefault(pinned.name, []).append(pin.version)
    return found


def test_the_names_that_people_call_repeat_nothing():
    for name, line in ONE_LINE.items():
        assert listed(name) == [line]
    assert {path.name for path in (ROOT / "requirements").glob("*.txt")} == {*ONE_LINE, *CONSTRAINTS}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_name_every_package_inside_its_range(name):
    asked, pinned = ranges(), pins(name)
    assert set(pinned) == set(asked) - {"flash-attn"}, "flash-attn is built on GPU machines, for their CUDA"
    for package, versions in pinned.items():
        assert all(version in asked[package].specifier for version in versions), package


def test_the_oldest_lane_stands_at_the_lower_ends():
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert oldest["torch"] == newest["torch"], "machines have one build of it"
    for package in ("transformers", "tokenizers", "datasets", "huggingface-hub", "datatrove"):
        (low,) = oldest[package]
        lowest = next(s.version for s in ranges()[package].specifier if s.operator == ">=")
        assert re.match(rf"{re.escape(lowest)}(\.|$)", low), package


def test_base_is_the_same_on_every_machine():
    base = [Requirement(line) for line in project()["dependencies"]]
    torch = next(r for r in base if r.name == "torch")
    named = [str(torch.specifier), *pins("constraints.txt")["torch"], *pins("constraints-oldest.txt")["torch"]]
    assert not [one for one in named if "+" in one], "the public version: which build it is, is the machine's choice"
    gpu_only = {"triton", "flash-attn", "transformer-engine", "torchao", "bitsandbytes"}
    assert not [r.name for r in base if r.name in gpu_only or r.name.startswith("nvidia")]
