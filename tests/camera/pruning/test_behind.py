"""Work in a thread is done in order, and what fails there is heard of."""

import threading

import pytest

from camera.pruning.behind import Behind


def test_work_is_done_in_the_order_in_which_it_was_given() -> None:
    done: list[int] = []
    behind = Behind()
    for number in range(20):
        behind.submit(done.append, number)
    behind.do(done.append, 20)
    behind.close()
    assert done == list(range(21))


def test_whoever_gives_work_waits_while_two_pieces_are_waiting() -> None:
    go, two, given = threading.Event(), threading.Event(), []
    behind = Behind()

    def give() -> None:
        for number in range(3):
            behind.submit(go.wait)
            given.append(number)
            if number == 1:
                two.set()

    giver = threading.Thread(target=give)
    giver.start()
    two.wait()
    giver.join(0.05)
    assert given == [0, 1]
    go.set()
    giver.join()
    behind.close()
    assert given == [0, 1, 2]


def test_what_fails_stops_all_that_comes_after_and_is_raised_by_it() -> None:
    done: list[int] = []
    behind = Behind()

    def fail() -> None:
        raise OSError("no room")

    behind.submit(fail)
    with pytest.raises(OSError, match="no room"):
        behind.do(done.append, 1)
    with pytest.raises(OSError, match="no room"):
        behind.submit(done.append, 2)
    behind.close()
    assert done == []
