"""A damaged checkpoint is seen before it is read, and the next older one is taken."""

import pytest

from mllm.common.errors import UserError
from tests.train.data import write_config
from tests.train.test_main import write_checkpoint
from train.check import find_checkpoint, tell_of_checkpoint
from train.config import load_config
from train.run import prepare_folder
from train.seal import SEAL, damage, seal
from train.trainer import DiskFull, check_space


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {
    "a flipped bit": (lambda states: flip(states / "model.pt"), "global_step6/model.pt is not what was written"),
    "a cut": (lambda states: (states / "model.pt").write_bytes(b"x" * 7), "has 7 bytes of 64"),
    "a missing file": (lambda states: (states / "model.pt").unlink(), "global_step6/model.pt is missing"),
    "a broken seal": (lambda states: (states.parent / SEAL).write_text("{"), "digests.json cannot be read"),
    "another latest": (lambda states: (states.parent / "latest").write_bytes(b"\xff"), "latest is not"),
}


@pytest.fixture
def config(tmp_path):
    """Of a run with sealed checkpoints of three and six steps."""
    config = load_config(write_config(tmp_path))
    prepare_folder(config, fresh=True)
    for step in (3, 6):
        checkpoint = write_checkpoint(tmp_path / "run", step)
        (checkpoint / f"global_step{step}" / "model.pt").write_bytes(b"weights!" * 8)
        seal(checkpoint)
    return config


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_says_what_is_wrong(config, harm, capsys):
    newest = find_checkpoint(config)
    assert (newest.name, damage(newest)) == ("checkpoint-6", None)
    harm, words = HARMS[harm]
    harm(newest / "global_step6")
    found = find_checkpoint(config)
    tell_of_checkpoint(config, found, 12)
    warning, start = capsys.readouterr().out.splitlines()
    assert found.name == "checkpoint-3"
    assert warning.startswith("warning: ")
    assert words in warning
    assert start.endswith("checkpoint-3 of 12 steps")
    with pytest.raises(UserError, match=r"run\.resume"):
        find_checkpoint(config.model_copy(update={"run": config.run.model_copy(update={"resume": str(newest)})}))


def test_too_little_room_is_told_with_what_is_left_and_what_is_needed(tmp_path):
    check_space(tmp_path / "run", 1)
    with pytest.raises(DiskFull, match=r"MB left, and at least 1,000,000,000,000\.0 MB are needed"):
        check_space(tmp_path / "run", 10**18)
