"""How a run is asked to stop, and with which status it ends. Imports nothing heavy: ranks begin here."""

import signal
import time

BEGUN = time.time()  # when this process did: seconds, as `time.time()` counts them
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, and the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SIGUSR1: Slurm's warning, where asked for


class Stopped(Exception):
    """Says after which step a run stopped, and where it is saved."""
