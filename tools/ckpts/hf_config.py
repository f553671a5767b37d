#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Face: the configuration of a Hugging Face model, ready to train from it or to read it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, installed or not

from megatron.checkpoint.loading.hf_view import PREFIX, HFModel, fetch, ready_yaml  # noqa: E402  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.neox_arguments.cli import run_face  # noqa: E402
from megatron.tool_flags import ToolParser  # noqa: E402

ABOUT = "Prints the keys that describe a Hugging Face model and start from its weights; a run's own keys (data, batch, lr) stand elsewhere."
USAGE = """python tools/ckpts/hf_config.py MODEL [--output FILE.yml]

  MODEL           the folder of a model, or its hub id with or without @revision (downloaded if need be)
  --output FILE   write there; otherwise to the screen"""


def main(argv: list[str]) -> int:
    """Print or write it."""
    flags = ToolParser(allow_abbrev=False, add_help=False, usage=USAGE)
    flags.add_argument("model")
    flags.add_argument("--output", type=Path)
    given = flags.parse_args(argv)
    if given.output is not None and given.output.exists():
        raise ConfigError("the file is there already", where=str(given.output), fix="give another name")
    found = fetch(PREFIX + given.model.removeprefix(PREFIX), contents=False)
    load = PREFIX + (
        str(found.directory) if found.revision is None else f"{given.model.removeprefix(PREFIX).partition('@')[0]}@{found.revision}"
    )
    text = ready_yaml(HFModel.open(found.directory), load)
    if given.output is None:
        sys.stdout.write(text)
    else:
        given.output.write_text(text, encoding="utf-8")
        print(f"wrote {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False, keys=False))
