# SPDX-License-Identifier: Apache-2.0
"""Command-line words to config files and key overrides, and the encoded configuration on a worker's command line."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from megatron.errors import ConfigError
from megatron.secrets import secret_names

from .problems import ConfigProblems, Problem, closest
from .sections import SECTION_OF, SECTIONS
from .yaml_loader import fold, scalar

# Short spellings of keys, and one long one: --autotuning sets the key autotuning_run (the key autotuning is a dict).
SHORT = {"-H": "hostfile", "-i": "sample_input_file", "-o": "sample_output_file"}
LONG = {"autotuning": "autotuning_run"}
CONF_DIR = ("-d", "--conf_dir")
SWITCHES = ("debug", "dry_run", "help")
# A key inside a dict that has a short name of its own: said as a flag, the short name changes the dict of the files.
INSIDE = {"lr": "optimizer.params.lr", "zero_stage": "zero_optimization.stage"}
CONFIG_SUFFIXES = (".yml", ".yaml", ".json")
NEGATIVE = re.compile(r"-\.?\d")
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

HELP = """\
usage: {usage}

{about}

  -d, --conf_dir DIR             folder of the config files
  -H, --hostfile FILE            hosts and slots ("name slots=N")
  --wandb_group, --wandb_run_name, --wandb_team NAME
  --eval_tasks TASK...           what eval.py evaluates
  --eval_results_prefix PREFIX   prefix of the result file
  --iteration N                  checkpoint to load
  -i, --sample_input_file FILE   prompts of generate.py
  -o, --sample_output_file FILE  where generate.py writes
  --autotuning tune|run          DeepSpeed's autotuner
  --dry-run                      show what would be started, and stop
  --debug                        show tracebacks
  -h, --help                     this text

Every YAML key is a flag too: --train_iters 100, --train-iters=100, --checkpoint_activations (true), --eval_tasks a b,
--optimizer.params.lr 1e-4 (one entry of a dict). A flag wins over the files. One key explained:
  python -m megatron.neox_arguments explain rotary_pct
"""


@dataclass(kw_only=True)
class Words:
    """A command line, sorted: bare words in order, overrides (dotted names as written), switches, the config folder."""

    bare: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    conf_dir: str | None = None


def sort_words(argv: Sequence[str]) -> Words:
    """The words of a command line, sorted. All wrong flags are reported in one ConfigError, with the closest names."""
    words = Words()
    problems: list[Problem] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            words.bare.append(word)
            continue
        name, equals, value = word.partition("=")
        if equals:
            rest.insert(0, value)
        try:
            _take(name, bool(equals), rest, words)
        except ConfigProblems as error:
            problems += error.problems
            if equals:
                rest.pop(0)
    if problems:
        raise ConfigProblems(problems)
    return words


def _take(name: str, has_value: bool, rest: list[str], words: Words) -> None:
    """Sort one flag, and its value words out of `rest`, into `words`."""
    if name in CONF_DIR:
        words.conf_dir = _value(name, has_value, rest)
        return
    key = _key(name)
    if key in SWITCHES:
        words.switches.add(key)
        return
    if key in words.overrides:
        raise _problem(f"{name} is given twice", name, "keep one")
    if "." in key:
        words.overrides[key] = scalar(_value(name, has_value, rest))
        return
    kind = _kind(key)
    if kind is bool:
        words.overrides[key] = _truth(has_value, rest)
    elif kind is list:
        words.overrides[key] = _list(name, has_value, rest)
    else:
        words.overrides[key] = _typed(_value(name, has_value, rest), kind)


def _key(name: str) -> str:
    """The key a flag names, `-` folded to `_`; a problem with the closest name for none."""
    if name in SHORT:
        return SHORT[name]
    if name == "-h":
        return "help"
    key = fold(name[2:]) if name.startswith("--") else ""
    key = LONG.get(key, key)
    if key.partition(".")[0] in SECTION_OF or key in SWITCHES:
        return key
    near = closest(key or name.lstrip("-"), [*SECTION_OF, *SWITCHES, "conf_dir"])
    raise _problem(f"unknown flag {name}", name, "see --help; every YAML key is a flag", f"--{near}" if near else None)


def _value(name: str, has_value: bool, rest: list[str]) -> str:
    """The word after a flag. A word that looks like a flag is none, unless it was joined with `=` or is a number."""
    if rest and (has_value or not rest[0].startswith("-") or NEGATIVE.match(rest[0])):
        return rest.pop(0)
    raise _problem(f"{name} needs a value", name, f"write {name} VALUE, or {name}=VALUE if it begins with a dash")


def _problem(what: str, where: str, fix: str, near: str | None = None) -> ConfigProblems:
    return ConfigProblems([Problem(what, where=where, closest=near, fix=fix)])


def _truth(has_value: bool, rest: list[str]) -> Any:
    """A switch alone is true; a following yes/no word is its value, anything else stays where it is."""
    if rest and rest[0].lower() in TRUTH:
        return TRUTH[rest.pop(0).lower()]
    if has_value:
        return scalar(rest.pop(0))  # null, or something for the type check to refuse
    return True


def _list(name: str, has_value: bool, rest: list[str]) -> Any:
    """One or more words, or one YAML list. Config files end the list."""
    found = [_value(name, has_value, rest)]
    while not has_value and rest and not rest[0].startswith("-") and not rest[0].endswith(CONFIG_SUFFIXES):
        found.append(rest.pop(0))
    values = [scalar(word) for word in found]
    return values[0] if len(values) == 1 and not isinstance(values[0], (str, int, float)) else values


def _typed(word: str, kind: type) -> Any:
    """A word as YAML reads it; for a key that wants text, everything but null and quoted text stays as written."""
    value = scalar(word)
    return word if kind is str and value is not None and not isinstance(value, str) else value


def _kind(key: str) -> type:
    """bool, list or str where the key takes nothing else (but null); object otherwise."""
    annotation = SECTIONS[SECTION_OF[key]].model_fields[key].annotation
    parts = {get_origin(part) or part for part in (get_args(annotation) or (annotation,))} - {type(None)}
    if get_origin(annotation) is list:
        return list
    return parts.pop() if len(parts) == 1 and parts <= {bool, list, str} else object


# Linux takes at most 128 KiB in one argument; larger texts are compressed.
PLAIN_LIMIT = 96 * 1024
ARGUMENT_LIMIT = 128 * 1024 - 256


def encode_config(values: dict[str, Any]) -> str:
    """JSON as urlsafe base64; texts too long for one argument are zlib-compressed first.

    Raises ConfigError when a secret is among the values (anyone on the machine can read a command line), or
    when even the compressed text is longer than an argument may be.
    """
    secrets = list(secret_names(values))
    if secrets:
        raise ConfigError(
            f"a secret may not stand in a config: {', '.join(secrets)}",
            where=", ".join(secrets),
            fix="take it out of the YAML and export it in the environment (WANDB_API_KEY, COMET_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY)",
        )
    raw = json.dumps(values).encode()
    text = base64.urlsafe_b64encode(raw).decode()
    if len(text) > PLAIN_LIMIT:
        text = base64.urlsafe_b64encode(zlib.compress(raw, 9)).decode()
    if len(text) > ARGUMENT_LIMIT:
        raise ConfigError(
            f"the configuration takes {len(text)} bytes, more than one command-line argument holds ({ARGUMENT_LIMIT})",
            fix="start the workers on the YAML files themselves: torchrun --nproc_per_node N train.py CONF...",
        )
    return text


def decode_config(text: str, flag: str) -> dict[str, Any]:
    """What `encode_config` made. Raises ConfigError naming `flag` for anything else."""
    try:
        raw = base64.urlsafe_b64decode(text)
        values = json.loads(raw if raw.startswith(b"{") else zlib.decompress(raw))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ConfigError(f"{flag} is not base64 JSON ({error})", where=flag, fix="leave this flag to deepy.py") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{flag} holds {type(values).__name__}, not a mapping", where=flag, fix="leave this flag to deepy.py")
    return values
