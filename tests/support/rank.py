# SPDX-License-Identifier: Apache-2.0
"""One rank of `support.dist.run_distributed`: `python -m support.rank FOLDER`, told the rest by the environment."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the test's process is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def load(path: str, name: str) -> Any:
    """The function `name` of a file that need not be importable by a module name; what lies beside this file is."""
    if Path(path).parent == Path(__file__).parent:
        return getattr(importlib.import_module(f"support.{Path(path).stem}"), name)
    spec = importlib.util.spec_from_file_location("ranked_test", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def run(folder: Path, rank: int, world: int) -> None:
    """Do the task in `folder` and leave its result there."""
    task = pickle.loads((folder / "task").read_bytes())
    # Where every rank stands is in its log before the starter gives up.
    faulthandler.dump_traceback_later(max(1.0, 0.9 * task["timeout_s"] - 1.0))
    function = load(task["path"], task["name"])
    if task["init"]:
        import torch.distributed

        # A file as meeting place: no port that another test may take meanwhile.
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = function(rank, world, **task["kwargs"])
    temporary = folder / f"rank{rank}.result.tmp"
    temporary.write_bytes(pickle.dumps(result))
    temporary.rename(folder / f"rank{rank}.result")
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        # Nobody leaves while another still talks to it, nor with gloo's threads running, which can abort the process at its end.
        distributed.barrier()
        distributed.destroy_process_group()


def main() -> None:
    """Run, leave at once; on failure leave the traceback and the time before.

    Objects are not cleared up: a process group that is still held when gloo is cleared up makes one in fifty processes abort.
    """
    die_with_parent()
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    try:
        run(folder, rank, int(os.environ["WORLD_SIZE"]))
    except BaseException:
        (folder / f"rank{rank}.failed").write_text(str(time.time_ns()))
        traceback.print_exc()
        end(1)
    end(0)


def end(code: int) -> None:
    """End this process as it stands."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
