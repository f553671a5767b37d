# SPDX-License-Identifier: Apache-2.0
"""Starting the workers: DeepSpeed's launcher as an argument list, run without a shell. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron.errors import ConfigError
from megatron.log import get_logger

from .neox_args import NeoXArgs
from .world import DEFAULT_HOSTFILE, HostError, parse_filter, visible_devices

log = get_logger(__name__)

LOCAL_NAMES = ("localhost", "127.0.0.1")
# What a remote shell takes literally: pdsh hands its command to one.
SHELL_SAFE = re.compile(r"[\w@%+=:,./~-]*")
# DeepSpeed's local launcher reports a worker that died of signal n as exit status 256 - n.
LAST_SIGNAL = 31
# A worker that ends with one of these has told why.
EXPLAINED = (1, 2)
KILLED = 128
# So often a signal is only passed on; then the launcher is told, which kills what does not end by itself.
PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class Command:
    """An argument list, what it adds to the environment, and whether a signal goes to all it started or to it alone."""

    argv: list[str]
    env: dict[str, str]
    signal_group: bool


def launcher_command(args: NeoXArgs, script: str, script_args: list[str], environ: Mapping[str, str]) -> Command:
    """The launcher that runs `script` with `script_args` on every rank; nothing is started.

    environ: the launching process's environment. Raises ConfigError for a placement that cannot be.
    """
    hostfile = _hostfile(args, environ)
    runtime = args.runtime
    several = runtime.force_multi or runtime.deepspeed_slurm or runtime.deepspeed_mpi or runtime.autotuning_run
    if hostfile or several:
        return _runner_command(args, script, script_args, hostfile, environ)
    return _local_command(args, script, script_args, environ)


def _hostfile(args: NeoXArgs, environ: Mapping[str, str]) -> str | None:
    """The hostfile in use: the key, else DLTS_HOSTFILE, else the customary path if it is there."""
    for path in (args.runtime.hostfile, environ.get("DLTS_HOSTFILE")):
        if path:
            if not Path(path).is_file():
                raise ConfigError(
                    f"hostfile {path} does not exist", where="hostfile", mend="give an existing file, or none for this machine alone"
                )
            return path
    return DEFAULT_HOSTFILE if Path(DEFAULT_HOSTFILE).is_file() else None


# One machine


def _local_command(args: NeoXArgs, script: str, script_args: list[str], environ: Mapping[str, str]) -> Command:
    devices = _local_devices(args, environ)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    argv = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    argv += [f"--world_info={world}", f"--master_addr={args.runtime.master_addr or '127.0.0.1'}", f"--master_port={_port(args, environ)}"]
    argv += ["--no_local_rank", f"--log_level={_log_level(environ)}", script, *script_args]
    return Command(argv=argv, env=_worker_env(len(devices), environ), signal_group=False)


def _local_devices(args: NeoXArgs, environ: Mapping[str, str]) -> list[int | str]:
    """Device numbers of the local ranks; without CUDA they only count the ranks."""
    runtime, count = args.runtime, args.runtime.global_num_gpus or 1
    if runtime.num_nodes and runtime.num_nodes > 1:
        raise ConfigError(
            f"num_nodes is {runtime.num_nodes}, but there is no hostfile", where="num_nodes", mend="set hostfile, or drop num_nodes"
        )
    on_cuda = visible_devices(environ) if environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    pool: list[int | str] = list(range(on_cuda or count))
    if on_cuda and visible:
        pool = [int(name) if name.isdecimal() else name for name in visible][:on_cuda]
    if runtime.include:
        pool = _slots(runtime.include, "include") or pool
    elif runtime.exclude:
        dropped = _slots(runtime.exclude, "exclude")
        pool = [device for device in pool if device not in dropped]
    if len(pool) < count:
        raise ConfigError(
            f"{count} ranks are wanted on this machine, but only {len(pool)} devices can be used",
            where="global_num_gpus",
            mend=f"set global_num_gpus to at most {len(pool)}, give a hostfile, or set DS_ACCELERATOR=cpu to run on CPU",
        )
    return pool[:count]


def _slots(text: str, key: str) -> list[int | str]:
    """[1, 3] of `localhost:1,3`; empty when only the host is named."""
    mend = "write localhost:0,1, or give a hostfile"
    try:
        hosts = parse_filter(text)
    except HostError as error:
        raise ConfigError(str(error), where=key, mend=mend) from None
    if len(hosts) != 1 or not set(hosts) <= {*LOCAL_NAMES, socket.gethostname()}:
        raise ConfigError(f"{key}: {text!r} is not about this machine, and there is no hostfile", where=key, mend=mend)
    (slots,) = hosts.values()
    return list(slots or ())


def _port(args: NeoXArgs, environ: Mapping[str, str]) -> int:
    """The key where it was given, else MASTER_PORT, else a free port, so that two runs on one machine do not meet."""
    if args.origin("master_port").kind != "default":
        return args.runtime.master_port
    if environ.get("MASTER_PORT", "").isdecimal():
        return int(environ["MASTER_PORT"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Several machines


def _runner_command(args: NeoXArgs, script: str, script_args: list[str], hostfile: str | None, environ: Mapping[str, str]) -> Command:
    runtime = args.runtime
    argv = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--no_local_rank", f"--log_level={_log_level(environ)}"]
    filtered = runtime.include or runtime.exclude
    flags = {
        "hostfile": hostfile,
        "launcher": runtime.launcher,
        "master_port": runtime.master_port,
        "master_addr": runtime.master_addr or environ.get("MASTER_ADDR"),
        "include": runtime.include,
        "exclude": runtime.exclude,
        "num_nodes": runtime.num_nodes if (runtime.num_nodes or -1) > 0 else None,
        # DeepSpeed takes a count or a filter, not both; the filter says more.
        "num_gpus": None if filtered else runtime.num_gpus,
        "autotuning": runtime.autotuning_run,
        "launcher_args": _launcher_args(args, environ),
    }
    argv += [f"--{name}={value}" for name, value in flags.items() if value]
    if runtime.force_multi or runtime.deepspeed_slurm or runtime.deepspeed_mpi:
        argv.append("--force_multi")
    if runtime.no_ssh_check:
        argv.append("--no_ssh_check")
    if runtime.launcher == "pdsh":
        _refuse_unsafe([script, *script_args, str(flags["master_addr"] or "")])
    if runtime.launcher == "openmpi" and (filtered or flags["num_nodes"] or flags["num_gpus"]):
        raise ConfigError("the openmpi launcher cannot filter hosts", where="launcher", mend="list only the hosts to use in the hostfile")
    env = {"PYTHONPATH": _python_path(environ)}
    if runtime.launcher == "pdsh" and environ.get("WANDB_API_KEY"):
        # The key goes by ssh's own environment channel (sshd must accept it), never as text of a remote command.
        env["PDSH_SSH_ARGS_APPEND"] = f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} -o SendEnv=WANDB_API_KEY".strip()
    return Command(argv=[*argv, script, *script_args], env=env, signal_group=True)


def _launcher_args(args: NeoXArgs, environ: Mapping[str, str]) -> str | None:
    """Flags for srun or mpirun, quoted as DeepSpeed splits them."""
    runtime = args.runtime
    words: list[str] = []
    if runtime.launcher == "slurm" or runtime.deepspeed_slurm:
        words += [f"--comment={runtime.comment}"] if runtime.comment else []
        words += [f"--account={runtime.account}"] if runtime.account else []
    if runtime.launcher == "openmpi" and environ.get("WANDB_API_KEY"):
        words += ["-x", "WANDB_API_KEY"]  # by name: mpirun takes the value from its environment
    return shlex.join(words) or None


def _refuse_unsafe(words: list[str]) -> None:
    unsafe = [word for word in words if not SHELL_SAFE.fullmatch(word)]
    if unsafe:
        raise ConfigError(
            f"the pdsh launcher would hand {unsafe[0]!r} to a remote shell",
            where="launcher",
            mend="use a name of letters, digits and @%+=:,./~-_ only, or another launcher",
        )


# Running it


def _log_level(environ: Mapping[str, str]) -> str:
    """DeepSpeed's launcher is silent unless LOGLEVEL is DEBUG: every line of it repeats the encoded configuration."""
    return "debug" if environ.get("LOGLEVEL", "").upper() == "DEBUG" else "critical"


def _worker_env(ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What the workers need beyond the environment they inherit."""
    env = {"PYTHONPATH": _python_path(environ)}
    if "OMP_NUM_THREADS" not in environ:
        env["OMP_NUM_THREADS"] = str(max(1, _cores() // ranks))
    if environ.get("DS_ACCELERATOR", "cpu") == "cpu" and not visible_devices(environ):
        env["DS_ACCELERATOR"] = "cpu"
    return env


def _python_path(environ: Mapping[str, str]) -> str:
    """The project's folder behind what is there: scripts outside of it find the package too."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root] + [root])


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(command: Command) -> int:
    """Start the command, hand SIGINT, SIGTERM and SIGHUP on to it, wait, and return the exit status a shell would show.

    Workers' own exit statuses come through as they are; a worker killed by signal n, or a signal n to us, gives 128 + n.
    """
    received: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for process in running:
            _send(process, signum, command.signal_group, patient=len(received) <= PATIENCE)

    names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(name, forward) for name in names}
    try:
        # A session of its own: a Ctrl-C reaches the workers once, through us, and a runner's children can be signalled together.
        process = subprocess.Popen(command.argv, env={**os.environ, **command.env}, start_new_session=True, preexec_fn=_die_with_parent())
        running.append(process)
        for signum in list(received):  # came between the handler and the start
            _send(process, signum, command.signal_group, patient=True)
        code = process.wait()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    return _exit_status(code, received)


def _send(process: subprocess.Popen[bytes], signum: int, group: bool, *, patient: bool) -> None:
    """Hand a signal on to a process group, or to a launcher's workers.

    patient: past the launcher, which on a signal kills its workers after 30 s, be they in the midst of a checkpoint
    """
    if process.poll() is not None:
        return
    if group:
        os.killpg(process.pid, signum)
        return
    workers = _children(process.pid) if patient else []
    # SIGTERM is what the launcher understands at any time; a SIGINT during its start would end in a traceback.
    for pid, number in [(worker, signum) for worker in workers] or [(process.pid, signal.SIGTERM)]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _children(pid: int) -> list[int]:
    """Processes that `pid` has started, where the system tells (Linux)."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _exit_status(code: int, received: list[int]) -> int:
    if received:
        return KILLED + received[0]
    killed_by = -code if code < 0 else 256 - code
    if not 0 < killed_by <= LAST_SIGNAL:
        if code and code not in EXPLAINED:
            log.error("a worker ended with exit status %d, so all were stopped", code)
        return code
    hint = ": the machine may have run out of memory" if killed_by == signal.SIGKILL else ""
    log.error("a worker was killed by %s%s", signal.Signals(killed_by).name, hint)
    return KILLED + killed_by


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux, the launcher is told to stop its workers when we are killed outright; a start hook for Popen."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_death_signal = 1  # PR_SET_PDEATHSIG

    def hook() -> None:
        prctl(set_death_signal, signal.SIGTERM)

    return hook
