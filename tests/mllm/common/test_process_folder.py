"""The folder of a process, on every way out."""

import signal
import subprocess
import sys
import textwrap

import pytest

from mllm.common.processes import ROOT

OWNER = """
    import signal, sys, time
    from mllm.common.folders import process_folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = process_folder("mllm-test")
    (folder / "upload").write_text("private")
    print(folder, oct(folder.stat().st_mode & 0o777), flush=True)
    time.sleep(60)
"""


def start(tmp_path):
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(OWNER)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().split()


def folders(tmp_path):
    return list(tmp_path.glob("mllm-test-*"))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_it_is_private_and_goes_with_the_process(ending, tmp_path):
    process, (_, mode) = start(tmp_path)
    assert mode == "0o700"
    process.send_signal(ending)
    process.wait()
    assert folders(tmp_path) == []


def test_what_a_killed_process_left_goes_at_the_next_start_and_nothing_of_a_living_one(tmp_path):
    (killed, _), (living, (kept, _)) = start(tmp_path), start(tmp_path)
    killed.kill()
    killed.wait()
    assert len(folders(tmp_path)) == 2
    third, (new, _) = start(tmp_path)
    assert {str(folder) for folder in folders(tmp_path)} == {kept, new}
    for process in (living, third):
        process.kill()
        process.wait()
