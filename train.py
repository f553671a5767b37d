# SPDX-License-Identifier: Apache-2.0
"""One training process. Started by deepy.py, torchrun or srun; `python train.py CONF...` alone is one rank."""

from __future__ import annotations

import sys

from megatron.launch.signals import note_signals
from megatron.neox_arguments.cli import consume_neox_args, end, run_face

USAGE = "python train.py CONF [CONF ...] [flags]   (several ranks: python deepy.py train.py ..., or torchrun train.py ...)"
ABOUT = "Trains a model as the config files say."


def main(argv: list[str]) -> int:
    """Read the configuration, then train; returns the exit status."""
    # From here on a signal waits for a moment at which all ranks can stop.
    received = note_signals(insisting=True)
    args = consume_neox_args(argv)
    # Imported only now: a mistake in the configuration is reported before seconds go into loading torch.
    from megatron.engine.distributed import naming_lost_ranks, stop
    from megatron.training import pretrain

    try:
        with naming_lost_ranks():
            status = pretrain(args, received).status
    except BaseException:
        stop(failed=True)
        raise
    stop()
    return status


if __name__ == "__main__":
    end(run_face(main, sys.argv[1:], usage=USAGE, about=ABOUT))
