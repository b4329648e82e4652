"""DeepSpeed's launcher of one machine's ranks, which is killed when what started it ends. `train.launch` starts it.

Signals to stop reach the ranks by themselves, and they end when they have saved: DeepSpeed would give them 30 seconds.
"""

import os
import signal

from deepspeed.launcher import launch

from mllm.common.processes import end_with_parent
from train.lock import STARTER
from train.status import SIGNALS, STOPPED


class Patient:
    """The module `signal` as the launcher sees it, which leaves the handlers that are set."""

    SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM

    @staticmethod
    def signal(number: int, handler: object) -> None:
        """Sets nothing."""


if __name__ == "__main__":
    end_with_parent(os.environ.get(STARTER))
    os.environ[STARTER] = str(os.getpid())  # of the ranks
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # not ignored: a rank would inherit that
    launch.signal = Patient
    # a rank has told of its stop in words already
    launch.logger.addFilter(lambda record: not record.getMessage().endswith(f"return code = {STOPPED}"))
    launch.main()
