"""What starts a run also ends it."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.accelerator import get_accelerator

from mllm.common.errors import UserError
from mllm.common.processes import ROOT, module_command, module_environment
from train.launch import launch, number_of_ranks

STARTER = """
import os
from train.launch import run_to_end
run_to_end(["sh", "-c", "sleep 60 & echo $!; wait"], dict(os.environ))
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


# What the user's environment says, ranks, GPUs that are then visible, and what the launcher is to name.
DEVICES = {
    "nothing": ({}, 2, 2, [0, 1]),
    "numbers": ({"CUDA_VISIBLE_DEVICES": "2,3"}, 2, 2, ["2", "3"]),
    "fewer ranks": ({"CUDA_VISIBLE_DEVICES": "5, 3,2"}, 2, 3, ["5", "3"]),
    "one": ({"CUDA_VISIBLE_DEVICES": "7"}, 1, 1, ["7"]),
    "unique names": ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,MIG-a1b2"}, 2, 2, ["GPU-8932f937", "MIG-a1b2"]),
    "HIP": ({"HIP_VISIBLE_DEVICES": "2,3"}, 2, 2, ["2", "3"]),
    "HIP before CUDA": ({"HIP_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 2, ["2", "3"]),
    "ROCR renumbers": ({"ROCR_VISIBLE_DEVICES": "4,5"}, 2, 2, [0, 1]),
    "hidden": ({"CUDA_VISIBLE_DEVICES": ""}, 2, 0, [0, 1]),
    "a CPU's machine": ({"CUDA_VISIBLE_DEVICES": "3"}, 2, 0, [0, 1]),
}


@pytest.mark.parametrize("case", DEVICES)
def test_ranks_get_the_devices_that_the_user_left_visible(case, monkeypatch, tmp_path):
    environment, ranks, gpus, devices = DEVICES[case]
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("train.stages.check", lambda *_, **__: None)
    started = {}

    def start(command, *, env, **_):
        started.update(command=command, env=env)
        return SimpleNamespace(wait=lambda: 0, pid=0)

    monkeypatch.setattr("train.launch.subprocess.Popen", start)
    (tmp_path / "config.yaml").write_text(
        "stage: align\nmodel: {path: x}\ndata: {mixture: x}\nrun: {output_dir: x, steps: 1}"
    )
    assert launch(tmp_path / "config.yaml", [], ranks) == 0
    told = next(word for word in started["command"] if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(told.partition("=")[2])) == {"localhost": devices}
    assert {name: started["env"].get(name) for name in environment} == environment
    # what DeepSpeed's launcher then does with them
    given = dict(started["env"])
    get_accelerator().set_visible_devices_envs(given, devices)
    assert given["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, devices))


@pytest.mark.parametrize(("asked", "gpus", "said"), [(0, 0, "at least 1"), (-1, 2, "at least 1"), (4, 2, "2 GPU")])
def test_a_number_of_ranks_that_cannot_be_is_refused(asked, gpus, said):
    with pytest.raises(UserError, match=said):
        number_of_ranks(asked, gpus)


def test_ranks_default_to_one_a_visible_gpu_or_two_on_a_cpu():
    assert [number_of_ranks(None, gpus) for gpus in (0, 1, 8)] == [2, 1, 8]
    assert number_of_ranks(3, 0) == 3


STRANGERS = ("train.py", "demo.py", "mllm/__init__.py", "random.py", "torch.py", "argparse.py", "data_recipes.py")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A folder whose files bear our names, and Python's; each would end the process that ran it."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "mllm").mkdir()
    for name in STRANGERS:
        (folder / name).write_text("raise SystemExit(9)\n")
    return folder


@pytest.mark.parametrize("module", ["train.launch", "train", "studies.conflict", "demo"])
def test_what_lies_in_the_current_folder_is_not_run_in_our_place(module, hostile):
    command = module_command(module, "--help")
    said = subprocess.run(command, cwd=hostile, env=module_environment(), capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout[:6]) == (0, "usage:"), said.stderr


def test_a_process_that_a_module_of_ours_starts_is_as_safe(hostile):
    child = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'train.launch', '--help']))"
    command = [sys.executable, "-c", child]
    said = subprocess.run(command, cwd=hostile, env=module_environment(), capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout[:6]) == (0, "usage:"), said.stderr


def test_a_checkout_is_found_without_being_installed_and_before_what_the_user_added(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "mine", str(ROOT)]))
    assert module_environment()["PYTHONPATH"] == os.pathsep.join([str(ROOT), "mine"])
    monkeypatch.setattr("mllm.common.processes.site.getsitepackages", lambda: [str(ROOT)])
    assert module_environment()["PYTHONPATH"] == os.pathsep.join(["", "mine", str(ROOT)])
