"""A run that is asked to stop finishes its step, saves, says where, and ends with a status of its own."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.common.ranks import summed
from train.status import BEGUN, SIGNALS


class Stopping(TrainerCallback):
    """Ends training after the step in which any rank got a signal, or in which the time is over.

    A signal that comes a second time does at once what it does to any process.
    """

    def __init__(self, max_hours: float | None, device: torch.device) -> None:
        self.device = device
        self.deadline = None if max_hours is None else BEGUN + max_hours * 3600
        self.signal: signal.Signals | None = None  # the first that this rank got
        self.reason = ""  # why the run stopped before its end; the same on all ranks

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes signals as a wish to stop; outside, they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                if not self.reason:  # else what started the ranks may end them now: their own status is told
                    signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal == number and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = self.signal or signal.Signals(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        is_late = self.deadline is not None and time.time() > self.deadline
        asked = torch.zeros(len(SIGNALS) + 1, device=self.device)  # which signals any rank got; the time is over
        asked[-1] = is_late
        if self.signal is not None:
            asked[SIGNALS.index(self.signal)] = 1
        asked = summed(asked).tolist()
        if not any(asked) or state.global_step >= state.max_steps:
            return
        names = [number.name for number in SIGNALS] + ["run.max_hours is over"]
        self.reason = next(name for name, count in zip(names, asked, strict=True) if count)
        control.should_save = control.should_training_stop = True
