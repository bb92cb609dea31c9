"""A training that a signal stops in an epoch, however slow the machine is.

    python stopped_training.py SIGNAL EPOCH RANK -m ich_pipeline train ...

The process with that rank sends itself the signal in the second step of the epoch (the first, where it has only one).
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from ich_pipeline import training
from ich_pipeline.cli import main


def stopping(name: str, epoch: int, stopped_rank: int) -> Any:
    """`GradientGuard.clip` that sends the signal when its time has come."""
    clip = training.GradientGuard.clip

    def clip_or_stop(guard: training.GradientGuard, engine: Any) -> None:
        length = engine.state.epoch_length
        step = (epoch - 1) * length + min(2, length)
        if (engine.state.iteration, training.rank()) == (step, stopped_rank):
            os.kill(os.getpid(), signal.Signals[name])
        clip(guard, engine)

    return clip_or_stop


def launcher(number: signal.Signals, epoch: int, stopped_rank: int = 0) -> tuple[str, ...]:
    """What stands between the interpreter and `-m ich_pipeline`."""
    return (str(Path(__file__)), number.name, str(epoch), str(stopped_rank))


if __name__ == "__main__":
    # A shell that started the tests in the background hands down that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given_name, given_epoch, given_rank, _, _, *words = sys.argv[1:]
    training.GradientGuard.clip = stopping(given_name, int(given_epoch), int(given_rank))  # type: ignore[method-assign]
    sys.argv = [sys.argv[0], *words]
    main()
