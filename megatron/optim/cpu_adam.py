# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's Adam for CPUs. Compiles its operator where it is not installed, and never waits for a compile that has died."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.optim import Optimizer

from megatron.deepspeed_private import cpu_adam_parts
from megatron.errors import BackendError, ConfigError
from megatron.log import get_logger

log = get_logger(__name__)

STALE_AFTER_S = 900.0
"""A compile takes a minute, on a busy machine six; a lock this old has been left behind by a process that was killed."""

FIX = "use type: Adam (fused on CPU too) or cpu_torch_adam, or reinstall DeepSpeed with DS_BUILD_CPU_ADAM=1"


def cpu_adam(groups: list[dict[str, Any]], numbers: dict[str, Any]) -> Optimizer:
    """The optimizer over `groups`, its operator compiled in this process where DeepSpeed was installed without it.

    Raises ConfigError for what it does not offer, BackendError where the operator cannot be compiled.
    """
    if numbers.pop("amsgrad", False):
        raise ConfigError("cpu_adam has no amsgrad", where="optimizer.params.amsgrad", fix="remove the key")
    if "adam_w_mode" in numbers:
        numbers["adamw_mode"] = numbers.pop("adam_w_mode")
    try:
        installed, optimizer, builder = cpu_adam_parts()
    except ImportError as error:
        raise BackendError(f"cpu_adam needs deepspeed: {error}", where="optimizer.type", fix="use type: Adam") from error
    if not installed:
        compile_operator(builder)
    made: Optimizer = optimizer(groups, **numbers)
    return made


def compile_operator(builder: Any) -> None:
    """Compile or find DeepSpeed's operator, one process of this machine after the other. Raises BackendError with the reason."""
    from torch.utils import cpp_extension

    if not builder.is_compatible(verbose=False):
        raise BackendError(f"cpu_adam cannot be compiled here: {builder.error_log or 'no reason given'}", where="optimizer.type", fix=FIX)
    folder = Path(cpp_extension._get_build_directory(builder.name, False))
    built = (folder / f"{builder.name}.so").exists()
    log.info("cpu_adam: %s DeepSpeed's operator in %s", "loading" if built else "compiling (a minute or more)", folder)
    # The system lets go of this lock when a process dies, however it dies.
    with FileLock(folder / "megatron.lock"):
        await_lock(folder / "lock")
        try:
            builder.load(verbose=False)
        except Exception as error:  # whatever a compiler says
            raise BackendError(f"cpu_adam's operator could not be compiled: {error}", where="optimizer.type", fix=FIX) from error


def await_lock(path: Path) -> None:
    """Wait for another program's compile, whose lock is the existence of a file; one that is older than a compile takes is removed."""
    with suppress(FileNotFoundError):  # the other program is done
        while (held_s := time.time() - path.stat().st_mtime) <= STALE_AFTER_S:
            time.sleep(0.5)
        log.warning("cpu_adam: removing %s, left %.0f minutes ago by a compile that was killed", path, held_s / 60)
        path.unlink()
