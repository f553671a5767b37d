# SPDX-License-Identifier: Apache-2.0
"""The command lines of deepy.py and of the scripts it starts, as NeoXArgs; how every script runs, reports its errors and ends."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from megatron.errors import ConfigError, LostRankError, NeoXError, StoppedError
from megatron.launch.environment import place_from, visible_devices
from megatron.launch.rank_events import claim, write_failure
from megatron.log import setup_logging

from .deepspeed import deepspeed_config
from .flags import HELP, INSIDE, Words, decode_config, encode_config, sort_words
from .neox_args import NeoXArgs
from .yaml_loader import read_files

MEGATRON_CONFIG = "--megatron_config"
DEEPSPEED_CONFIG = "--deepspeed_config"
# Added by launchers; ranks are read from the environment.
IGNORED = ("--local_rank", "--local-rank")
# What DeepSpeed's autotuner changes in the DeepSpeed config it hands to the workers.
TUNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "autotuning")
AUTOTUNING_FILE = "ds_config.json"
INTERRUPTED = 130
# Longer than a launcher takes to see that a rank has ended and to stop the others.
PATIENCE_S = 4.0
SPINS = "2000"
# Flags, each with one value, that belong to a script and are no configuration keys.
OWN_FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"logits.py": ("--tokens", "--output", "--rows"), "coord_check.py": ("--widths", "--steps", "--max_slope", "--output")}
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What deepy.py was asked for: the resolved config, the script with its arguments, and the two switches."""

    args: NeoXArgs
    script: str
    script_args: tuple[str, ...]
    dry_run: bool
    debug: bool


def consume_deepy_args(argv: Sequence[str]) -> Launch:
    """`SCRIPT [-d DIR] CONF... [flags]` -> what to start. Raises ConfigError for whatever is wrong with it."""
    own, argv = _split_own(argv)
    words = sort_words(argv)
    if len(words.bare) < 2:
        missing = "script and config files" if not words.bare else "config files"
        raise ConfigError(f"no {missing} given", where="command line", fix="python deepy.py train.py configs/quickstart.yml")
    script, *confs = words.bare
    if not Path(script).is_file():
        raise ConfigError(
            f"the script {script} does not exist", where="command line", fix="python deepy.py SCRIPT CONF...: the script comes first"
        )
    words.overrides["user_script"] = script
    args = read_config(words, confs)
    debug = "debug" in words.switches
    passed_on = (*worker_words(args, debug=debug), *own)
    return Launch(args=args, script=script, script_args=passed_on, dry_run="dry_run" in words.switches, debug=debug)


def consume_neox_args(argv: Sequence[str], overwrites: Mapping[str, Any] | None = None) -> NeoXArgs:
    """A worker's command line, from deepy.py (two encoded configs) or from a user (`CONF... [flags]`), as NeoXArgs.

    overwrites: settings of the calling script, which win over files and flags alike.
    The number of ranks is that of the launcher's environment, else 1. Raises ConfigError.
    """
    encoded, rest = _split_encoded(argv)
    words = sort_words(rest)
    fixed = dict(overwrites or {})
    if MEGATRON_CONFIG not in encoded:
        if not words.bare:
            raise ConfigError("no config files given", where="command line", fix="python train.py CONF..., or start it with deepy.py")
        found = rank_count(os.environ)
        wanted = words.overrides.get("global_num_gpus") or read_files(words.bare, words.conf_dir).values.get("global_num_gpus")
        _check_ranks(fixed.get("global_num_gpus", wanted), found)
        return read_config(words, words.bare, {"global_num_gpus": found, **fixed})
    if words.bare or words.overrides:
        raise ConfigError(
            f"{MEGATRON_CONFIG} holds the whole configuration; files and flags beside it would be ignored",
            where="command line",
            fix="give them to deepy.py, or drop the encoded config",
        )
    return _from_encoded(encoded, fixed)


def read_config(words: Words, confs: Sequence[str], fixed: Mapping[str, Any] | None = None) -> NeoXArgs:
    """The config files `confs` with the overrides of a sorted command line, and the calling script's `fixed` settings over both."""
    return NeoXArgs.from_ymls(confs, overwrites={**_overwrites(words, confs), **(fixed or {})}, conf_dir=words.conf_dir)


def worker_words(args: NeoXArgs, *, debug: bool = False) -> tuple[str, ...]:
    """The arguments every worker gets: both configs, encoded. Raises ConfigError if a secret would be among them."""
    if args.runtime.autotuning_run:
        tuned = AUTOTUNING_FILE  # the autotuner edits a file
    else:
        tuned = encode_config(deepspeed_config(args))
    words = (
        DEEPSPEED_CONFIG,
        tuned,
        MEGATRON_CONFIG,
        encode_config({**args.given(), "global_num_gpus": args.runtime.global_num_gpus}),
    )
    return (*words, "--debug") if debug else words


def rank_count(environ: Mapping[str, str]) -> int:
    """How many processes were started together, as the launcher's environment tells (torchrun, DeepSpeed, MPI, srun); else 1."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environ.get(name, "").isdecimal():
            return max(1, int(environ[name]))
    return 1


def run_face(
    main: Callable[[list[str]], int | None], argv: Sequence[str], *, usage: str, about: str, ranks: bool = True, keys: bool = True
) -> int:
    """Run a script's `main` as a user wants it: --help answers at once, errors are reports on stderr, the result is the exit status.

    ranks: the script is one of a run's ranks, if mpirun or srun started it; False for launchers and tools
    keys:  YAML keys and the launcher's options are flags of this script, too, so --help names them
    Tracebacks of errors raised on purpose appear with --debug only. A rank of deepy.py leaves its report to it, which tells the first
    failing rank's first.
    """
    if not set(argv).isdisjoint(("-h", "--help")):
        sys.stdout.write(HELP.format(usage=usage, about=about) if keys else f"usage: {usage.strip()}\n\n{about}".rstrip() + "\n")
        return 0
    note = claim(os.environ)
    try:
        if ranks:
            _take_place()
        setup_logging()
        _prepare_environment()
        return main(list(argv)) or 0
    except StoppedError as error:
        # No failure, for which a launcher would end the other ranks and report.
        sys.stderr.write(error.report() + "\n")
        return error.exit_code
    except NeoXError as error:
        _report(error, note, debug="--debug" in argv)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output, `head` say, has enough. Nothing is left to be flushed into it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        if note is None:
            raise
        write_failure(note, traceback.format_exc().rstrip(), consequence=False)
        return 1


def end(code: int) -> NoReturn:
    """End this process with the exit status of `run_face`.

    One of several ranks ends without clearing up its objects: a process group that one of them still holds when gloo is cleared up makes
    about one in fifty processes abort, and a run that went well would end with status 134.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "torch" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(error: NeoXError, note: str | None, *, debug: bool) -> None:
    """Tell an error: in the file `note` if this is a rank of deepy.py, else on stderr."""
    lost = isinstance(error, LostRankError)
    trace = "".join(traceback.format_exception(error)) if debug else ""
    if note is not None:
        write_failure(note, trace + error.report(), consequence=lost)
        return
    rank = os.environ.get("RANK", "0")
    # What is wrong on all ranks is told once, by rank 0: its end stops the others. Whoever is still here then has news.
    time.sleep(PATIENCE_S * ((rank != "0") + 2 * lost))
    sys.stderr.write(trace + (f"[rank {rank}] " if rank != "0" else "") + error.report() + "\n")
    sys.stderr.flush()


def _take_place() -> None:
    """Have a rank of mpirun or srun know its place under the names that torch, DeepSpeed and the log read."""
    if "RANK" in os.environ:
        return
    place = place_from(os.environ)
    if place.world_size > 1:
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", *(["MASTER_PORT"] if place.master_port else [])]
        os.environ.update({name: place.environment()[name] for name in names})


def _prepare_environment() -> None:
    """Settings that libraries read when they are loaded."""
    # DeepSpeed looks for devices when it is imported, and warns where there are none.
    if "DS_ACCELERATOR" not in os.environ and not visible_devices(os.environ):
        os.environ["DS_ACCELERATOR"] = "cpu"
    # GNU OpenMP's threads spin for milliseconds at each barrier. Where a core is shared with other work, each then waits for one
    # that is not running, and steps become five to ten times slower; a short spin costs nothing elsewhere.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _split_own(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the script's own flags, each with its value, and all other words."""
    flags = next((OWN_FLAGS[name] for word in argv if (name := Path(word).name) in OWN_FLAGS), ())
    own, rest = _take_flags(argv, flags)
    return [f"{name}={value}" for name, value in own], rest


def _split_encoded(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The encoded configs, and the other words without those that launchers add."""
    found, rest = _take_flags(argv, (MEGATRON_CONFIG, DEEPSPEED_CONFIG, *IGNORED))
    return {name: value for name, value in found if name not in IGNORED}, rest


def _take_flags(argv: Sequence[str], flags: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The flags among the words, each with its value, and all other words."""
    found: list[tuple[str, str]] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in flags:
            found.append((name, value if equals else next(words, "")))
        else:
            rest.append(word)
    return found, rest


def _overwrites(words: Words, confs: Sequence[str]) -> dict[str, Any]:
    """Overrides by key. A dotted one changes its entry in the files' dict; `--lr` is such a one where there is an optimizer dict."""
    flat = {key: value for key, value in words.overrides.items() if "." not in key}
    dotted = {key: value for key, value in words.overrides.items() if "." in key}
    inside = {key: INSIDE[key] for key in flat if key in INSIDE}
    if not dotted and not inside:
        return flat
    files = read_files(confs, words.conf_dir).values
    for key, path in inside.items():
        if isinstance(flat.get(path.partition(".")[0], files.get(path.partition(".")[0])), dict):
            dotted.setdefault(path, flat.pop(key))
    for path, value in dotted.items():
        key, *inner = path.split(".")
        if key not in flat:
            flat[key] = deepcopy(files.get(key))
        flat[key] = _with_entry(flat[key], inner, value, f"--{path}")
    return flat


def _with_entry(block: Any, path: list[str], value: Any, flag: str) -> dict[str, Any]:
    """`block` with the entry at `path` set; missing dicts on the way are made."""
    if block is None:
        block = {}
    if not isinstance(block, dict):
        raise ConfigError(f"{flag} names an entry of a mapping, but there is {block!r}", where=flag, fix="give the whole key")
    head, *rest = path
    return {**block, head: _with_entry(block.get(head), rest, value, flag) if rest else value}


def _from_encoded(encoded: Mapping[str, str], fixed: dict[str, Any]) -> NeoXArgs:
    values = decode_config(encoded[MEGATRON_CONFIG], MEGATRON_CONFIG)
    if values.get("autotuning_run") and DEEPSPEED_CONFIG in encoded:
        tuned = _tuned(encoded[DEEPSPEED_CONFIG])
        values |= {key: tuned[key] for key in TUNED if key in tuned}
    if "WORLD_SIZE" in os.environ:
        _check_ranks(values.get("global_num_gpus"), rank_count(os.environ))
    return NeoXArgs.from_dict({**values, **fixed})


def _check_ranks(wanted: Any, found: int) -> None:
    if wanted not in (None, found):
        raise ConfigError(
            f"the configuration is for {wanted} ranks, but {found} {'was' if found == 1 else 'were'} started",
            where="global_num_gpus",
            fix=f"start {wanted} processes (python deepy.py does), or leave global_num_gpus out",
        )


def _tuned(text: str) -> dict[str, Any]:
    """The DeepSpeed config of an autotuning trial: a JSON file, or encoded."""
    if not Path(text).is_file():
        return decode_config(text, DEEPSPEED_CONFIG)
    loaded = json.loads(Path(text).read_text())
    return loaded if isinstance(loaded, dict) else {}
