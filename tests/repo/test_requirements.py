# SPDX-License-Identifier: Apache-2.0
"""requirements/*.txt say what pyproject.toml says, and nothing in the base needs a GPU."""

from __future__ import annotations

import re

from packaging.requirements import Requirement

from support.tree import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings the same parser
    import tomli as tomllib


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def listed(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_requirement_files_equal_pyproject():
    table = project()
    assert listed("requirements.txt") == table["dependencies"]
    extras = table["optional-dependencies"]
    for extra, wanted in extras.items():
        assert listed(f"requirements-{extra}.txt") == ["-r requirements.txt", *wanted], extra
    names = {path.name for path in (ROOT / "requirements").glob("*.txt")}
    assert names == {"requirements.txt", "constraints.txt", *(f"requirements-{extra}.txt" for extra in extras)}
    assert set(extras) >= {"dev", "wandb", "comet", "eval", "s3", "serve", "flash", "te", "fp8"}


def test_constraints_lie_inside_the_ranges():
    table = project()
    ranges = {}
    for line in [*table["dependencies"], *(r for rows in table["optional-dependencies"].values() for r in rows)]:
        requirement = Requirement(line)
        ranges[requirement.name] = requirement.specifier
    for line in listed("constraints.txt"):
        pinned = Requirement(line)
        (pin,) = pinned.specifier
        assert pin.operator == "==" and pin.version in ranges[pinned.name], line


def test_base_is_the_same_on_every_machine():
    base = [Requirement(line) for line in project()["dependencies"]]
    torch = next(r for r in base if r.name == "torch")
    assert re.fullmatch(r"==[0-9.]+", str(torch.specifier)), "the public version: which build it is, is the machine's choice"
    gpu_only = {"triton", "flash-attn", "transformer-engine", "torchao", "bitsandbytes"}
    assert not [r.name for r in base if r.name in gpu_only or r.name.startswith("nvidia")]
