# SPDX-License-Identifier: Apache-2.0
"""Configurations as text: shown, explained, compared, and the generated reference."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.__main__ import main
from megatron.neox_arguments.document import argument_lines, diff, document, explain, schema, show
from megatron.neox_arguments.sections import SECTION_OF

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yml")


def test_the_committed_reference_is_current(repo: Path) -> None:
    committed = (repo / "documentation" / "CONFIG_ARGUMENTS.md").read_text()
    assert committed == document(), "run: python -m megatron.neox_arguments document > documentation/CONFIG_ARGUMENTS.md"
    assert all(f"| `{key}` |" in committed for key in SECTION_OF)


def test_what_is_shown_is_yaml_that_resolves_to_the_same(tmp_path: Path) -> None:
    args = NeoXArgs.from_ymls([QUICKSTART], overwrites={"seed": 7, "global_num_gpus": 1, "comet_others": {"api_key": "abc", "note": "n"}})
    told = show(args)
    assert "abc" not in told and "api_key" in told
    line = next(row for row in told.splitlines() if row.startswith("hidden_size:"))
    assert line.endswith(f"# {QUICKSTART}:{1 + Path(QUICKSTART).read_text().splitlines().index('hidden_size: 192')}")
    assert "seed: 7" in told and "# --seed" in told and "# derived from" in told
    assert "log_param_norm" not in told and "log_param_norm" in show(args, every=True)
    (tmp_path / "again.yml").write_text(re.sub(r"(?m)^config_files:.*$", "", show(args, every=True)))
    again = NeoXArgs.from_ymls([tmp_path / "again.yml"])
    assert {**again.to_flat(), "config_files": None, "comet_others": None} == {**args.to_flat(), "config_files": None, "comet_others": None}


def test_a_key_is_explained_with_its_value_here() -> None:
    told = explain("rotary-pct", NeoXArgs.from_ymls([QUICKSTART]))
    for part in (
        "rotary_pct\n",
        "allowed: a number > 0 and <= 1",
        "default: 1.0",
        "section: attention",
        "value:   0.25",
        "quickstart.yml:",
    ):
        assert part in told
    assert "value" not in explain("rotary_pct")


def test_differences_name_both_values_and_both_places() -> None:
    left, right = (NeoXArgs.from_ymls([CONFIGS / "pythia" / name, CONFIGS / "local_setup.yml"]) for name in ("14M.yml", "31M.yml"))
    told = diff(left, right)
    assert "hidden_size: 128 -> 256" in told and "14M.yml:" in told and "31M.yml:" in told
    assert diff(left, left) == ""


def test_the_schema_accepts_both_spellings_and_nothing_unknown() -> None:
    made = schema()
    assert set(SECTION_OF) <= set(made["properties"]) and made["properties"]["rotary-pct"] == {"$ref": "#/properties/rotary_pct"}
    assert made["additionalProperties"] is False
    assert made["properties"]["num_layers"]["description"]
    json.dumps(made)


def test_the_command_answers_with_its_exit_status() -> None:
    pair = [str(CONFIGS / "pythia" / "14M.yml") + "," + str(CONFIGS / "local_setup.yml")] * 2
    assert main(["diff", *pair]) == 0
    assert main(["diff", *pair, "--seed", "3"]) == 0
    assert main(["diff", pair[0], pair[0].replace("14M", "31M")]) == 1
    for words, told in ((["explain", "rotary_pc"], "did you mean rotary_pct?"), (["sho"], "no such command"), (["show", "no"], "no.yml")):
        done = subprocess.run(
            [sys.executable, "-m", "megatron.neox_arguments", *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (77, "")
        assert told in done.stderr and "Traceback" not in done.stderr


def test_head_of_a_training_log_names_what_was_set() -> None:
    """Consumers grep the save path there; defaults would bury it."""
    args = NeoXArgs.from_ymls([QUICKSTART], overwrites={"save": "runs/model_organisms/a", "load": None, "rotary_pct": 0.5})
    lines = list(argument_lines(args))
    assert lines[0] == "-------------------- arguments --------------------"
    assert lines[-1] == "---------------- end of arguments ----------------"
    assert any(line.startswith("  save ....") and "runs/model_organisms/a" in line and line.endswith("....updated") for line in lines)
    assert not any(line.startswith("  rope_scaling ") for line in lines)
