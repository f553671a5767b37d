# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron.neox_arguments`: configurations shown, explained and compared."""

from __future__ import annotations

import json
import sys

from megatron.errors import ConfigError

from .cli import read_config, run_face
from .document import diff, document, explain, schema, show
from .flags import sort_words

USAGE = """python -m megatron.neox_arguments COMMAND

  show CONF... [--all] [flags]   the resolved configuration, every value with its origin (--all: defaults too)
  explain KEY [CONF...] [flags]  one key: what it does, what may be written, its value in these files
  diff A B [flags]               what differs between two configs (join files with a comma: a.yml,local.yml); exit status 1 if anything does
  schema                         JSON Schema for editors
  document                       documentation/CONFIG_ARGUMENTS.md"""
ABOUT = "Answers questions about configurations; the flags below work as for deepy.py."


def main(argv: list[str]) -> int:
    """Answer one question on stdout."""
    command, *rest = argv or [""]
    if command == "schema":
        sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
    elif command == "document":
        sys.stdout.write(document())
    elif command == "show":
        words = sort_words([word for word in rest if word != "--all"])
        sys.stdout.write(show(read_config(words, words.bare), every="--all" in rest))
    elif command == "explain":
        words = sort_words(rest)
        if not words.bare:
            raise ConfigError("no key given", where="command line", fix="explain KEY [CONF ...]")
        key, *confs = words.bare
        sys.stdout.write(explain(key, read_config(words, confs) if confs else None))
    elif command == "diff":
        return _diff(rest)
    else:
        raise ConfigError(
            f"no such command: {command!r}", where="command line", fix="one of show, explain, diff, schema, document; see --help"
        )
    return 0


def _diff(rest: list[str]) -> int:
    words = sort_words(rest)
    if len(words.bare) != 2:
        raise ConfigError(
            f"diff takes two configs, not {len(words.bare)}", where="command line", fix="join several files with a comma: a.yml,local.yml"
        )
    left, right = (read_config(words, name.split(",")) for name in words.bare)
    told = diff(left, right)
    sys.stdout.write(told)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT, ranks=False))
