"""Who may use the model, and who waits: one bounded queue for the page and for programs.

Answers run `at_once` at a time; `waiting` more may wait in the order they came, `a_client` of each client. Whoever
comes then is told at once that the model is busy, instead of being promised an answer after everybody else's.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from mllm.common.errors import UserError

POLL = 0.05  # seconds between looks at whether somebody still waits


class BusyError(UserError):
    """No place is free: try again later. Status 429 for programs."""


class Places:
    """The places at the model and in its queue.

    One answer at a time is the default because a second one gains nothing on a CPU, whose cores the first one fills.
    """

    def __init__(self, *, at_once: int = 1, waiting: int = 16, a_client: int = 1) -> None:
        self.at_once, self.waiting, self.a_client = at_once, waiting, a_client
        self._running = 0
        self._queue: deque[object] = deque()
        self._of_client: Counter[str] = Counter()
        self._changed = threading.Condition()

    def check(self, client: str) -> None:
        """Raises `BusyError` if there is no place for the client now."""
        with self._changed:
            self._check(client)

    def _check(self, client: str) -> None:
        if self._of_client[client] >= self.a_client:
            raise BusyError("Your last question still waits for the model. Wait for its answer, or stop it.")
        if len(self._queue) >= self.waiting:
            raise BusyError(f"The model is busy: {self.waiting} questions wait already. Ask again in a moment.")

    @contextmanager
    def place(self, client: str, stop: threading.Event) -> Iterator[bool]:
        """Waits for the model and holds it for the block. Yields False if `stop` was set before it was free.

        Raises `BusyError` as `check` does. A client counts while it waits, no longer once it is answered.
        """
        me = object()
        with self._changed:
            self._check(client)
            self._queue.append(me)
            self._of_client[client] += 1
        has_place = False
        try:
            with self._changed:
                while not (self._queue[0] is me and self._running < self.at_once) and not stop.is_set():
                    self._changed.wait(POLL)
                has_place = not stop.is_set()
                self._running += has_place
                self._leave_queue(me, client)
            yield has_place
        finally:
            with self._changed:
                self._leave_queue(me, client)
                self._running -= has_place
                self._changed.notify_all()

    def _leave_queue(self, me: object, client: str) -> None:
        if me in self._queue:
            self._queue.remove(me)
            self._of_client -= Counter([client])
            self._changed.notify_all()
