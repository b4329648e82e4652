"""A run that is asked to stop stops after a whole step, saved, and goes on as if it had never stopped."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from train.launch import run_to_end
from train.status import SIGNALS, STOPPED
from train.stop import Stopping


def step(stopping: Stopping, number: int = 3, of: int = 5) -> TrainerControl:
    control = TrainerControl()
    stopping.on_step_end(None, SimpleNamespace(global_step=number, max_steps=of), control)
    return control


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_training_after_the_step_and_saves(number):
    stopping = Stopping(None, torch.device("cpu"))
    with stopping.listening():
        signal.raise_signal(number)
        control = step(stopping)
    assert (control.should_save, control.should_training_stop, stopping.reason) == (True, True, number.name)
    signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def test_without_a_signal_or_after_the_last_step_nothing_is_stopped():
    stopping = Stopping(100.0, torch.device("cpu"))
    before = signal.getsignal(signal.SIGTERM)
    with stopping.listening():
        assert not step(stopping).should_training_stop
        signal.raise_signal(signal.SIGUSR1)
        assert not step(stopping, 5, of=5).should_save
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_stops_when_its_time_is_over():
    stopping = Stopping(1e-9, torch.device("cpu"))
    assert step(stopping).should_save
    assert "run.max_hours" in stopping.reason


def test_what_is_ended_before_it_has_begun_tells_the_status_of_a_stop(capsys):
    began = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    assert run_to_end([sys.executable, "-c", began], dict(os.environ)) == STOPPED
    assert "stopped before there was anything to save" in capsys.readouterr().err
