"""Work goes on beside a block, and no longer than that."""

import threading

import pytest

from regrow.infra.beside import beside


def test_the_work_goes_on_until_the_block_ends():
    begun, heard = threading.Event(), []

    def work(over: threading.Event) -> None:
        heard.append(threading.current_thread())
        begun.set()
        heard.append(over.wait(60))

    with beside(work, "a name"):
        assert begun.wait(60)
        (thread,) = heard
        assert (thread.name, thread.daemon, thread.is_alive()) == ("a name", True, True)
        assert thread is not threading.current_thread()
    assert heard == [thread, True]
    assert not thread.is_alive()


def test_an_error_of_the_block_comes_through_when_the_work_has_ended():
    ended = []

    def work(over: threading.Event) -> None:
        ended.append(over.wait(60))

    with pytest.raises(ValueError, match="in the block"), beside(work, "a name"):
        raise ValueError("in the block")
    assert ended == [True]


def test_work_that_ends_first_is_no_matter():
    done = threading.Event()
    with beside(lambda over: done.set(), "a name"):
        assert done.wait(60)
