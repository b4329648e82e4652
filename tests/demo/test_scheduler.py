"""The queue before the model."""

import threading

import pytest

from demo.scheduler import BusyError, Places


def wait_in(places, client, stop=None):
    """Starts somebody who waits; returns the thread and what came of it."""
    came = []

    def wait():
        with places.place(client, stop or threading.Event()) as has_place:
            came.append(has_place)

    thread = threading.Thread(target=wait)
    thread.start()
    while client not in places._of_client:
        pass
    return thread, came


@pytest.fixture
def held():
    """Places whose only one is taken until the test is over."""
    places = Places(waiting=2)
    with places.place("first", threading.Event()):
        yield places


def test_a_place_too_many_is_refused_at_once(held):
    stop = threading.Event()
    waiting = [wait_in(held, client, stop) for client in ("a", "b")]
    with pytest.raises(BusyError, match="2 questions wait"):
        held.check("c")
    stop.set()
    for thread, came in waiting:
        thread.join()
        assert came == [False]
    held.check("c")


def test_a_client_waits_once(held):
    stop = threading.Event()
    thread, _ = wait_in(held, "a", stop)
    with pytest.raises(BusyError, match="still waits"), held.place("a", stop):
        pass
    stop.set()
    thread.join()
    held.check("a")


def test_places_are_given_in_the_order_of_asking():
    places, order = Places(), []

    def ask(client):
        with places.place(client, threading.Event()):
            order.append(client)

    with places.place("first", threading.Event()):
        threads = []
        for client in "abcd":
            threads.append(threading.Thread(target=ask, args=(client,)))
            threads[-1].start()
            while client not in places._of_client:
                pass
    for thread in threads:
        thread.join()
    assert order == list("abcd")


def test_a_failure_gives_the_place_back():
    places = Places()
    with pytest.raises(ValueError, match="lost"), places.place("a", threading.Event()):
        raise ValueError("lost")
    with places.place("b", threading.Event()) as has_place:
        assert has_place
