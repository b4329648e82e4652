"""What starts a run also ends it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

STARTER = """
import subprocess
from train.launch import wait_for
launcher = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True)
wait_for(launcher)
"""


def test_a_signal_to_end_reaches_what_the_launcher_started():
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    rank = Path("/proc") / starter.stdout.readline().strip()
    assert rank.exists()
    starter.send_signal(signal.SIGTERM)
    starter.wait(timeout=120)
    deadline = time.monotonic() + 60
    while rank.exists() and "zombie" not in (rank / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not rank.exists() or "zombie" in (rank / "status").read_text()
