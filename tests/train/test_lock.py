"""One job a folder, for as long as one of its processes lives."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm.common.errors import UserError
from mllm.common.processes import module_environment
from train.lock import LOCK, only_job

HOLDER = """
import sys, time
from pathlib import Path
from train.lock import only_job
with only_job(Path(sys.argv[1]), *map(int, sys.argv[2:])):
    print("held", flush=True)
    time.sleep(600)
"""
# A launcher with a child, as the ranks' launcher and a rank are.
FAMILY = """
import os, subprocess, sys, time
from mllm.common.processes import end_with_parent
end_with_parent()
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE, text=True)
    print(child.stdout.readline().strip(), flush=True)
else:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def hold(folder: Path, *rank: str, **environment: str) -> subprocess.Popen:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder), *rank]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=module_environment() | environment)
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("train.lock.PATIENCE", 0.0)


@pytest.mark.parametrize("rank", [None, 0], ids=["launcher", "rank"])
def test_a_second_job_is_refused_while_a_launcher_or_a_rank_lives_and_not_after_it_was_killed(tmp_path, rank):
    folder = tmp_path / "run"
    launcher = hold(folder)
    rank_1 = hold(folder, "1", MLLM_STARTER="1")
    for process in (launcher, rank_1) if rank is None else (launcher,):
        with pytest.raises(UserError, match="another job trains"), only_job(folder, rank):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    rank_1.kill()
    rank_1.wait()
    with only_job(folder, rank):
        assert (folder / LOCK).exists()


def test_the_ranks_of_one_job_do_not_refuse_each_other(tmp_path):
    holders = [hold(tmp_path), *(hold(tmp_path, rank, MLLM_STARTER="1") for rank in "01")]
    assert [holder.poll() for holder in holders] == [None] * 3
    for holder in holders:
        holder.kill()
        holder.wait()


def test_a_folder_that_nothing_was_written_to_is_not_left_behind(tmp_path):
    with only_job(tmp_path / "above" / "run"):
        assert (tmp_path / "above" / "run").is_dir()
    assert not list(tmp_path.iterdir())
    with only_job(tmp_path / "run"):
        (tmp_path / "run" / "adapter").mkdir()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's PR_SET_PDEATHSIG")
def test_what_a_killed_process_had_started_ends_with_it(tmp_path):
    (tmp_path / "family.py").write_text(FAMILY)
    environment = module_environment()
    parent = subprocess.Popen(
        [sys.executable, "family.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
    )
    child = Path("/proc") / parent.stdout.readline().strip() / "status"
    assert "zombie" not in child.read_text()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while child.exists() and "zombie" not in child.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.monotonic() < deadline
