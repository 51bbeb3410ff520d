from __future__ import annotations

import os
import signal
import time

import pytest

from nemo_spin.selfplay.signals import STOPPED, stop_on_signals, undisturbed


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 129)]
)
def test_a_request_to_stop_is_an_exit_with_a_code_of_its_own(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, stop_on_signals():
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")
    assert caught.value.code == code
    assert signal.getsignal(number) == before


ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", ALL)
def test_a_request_that_comes_while_children_are_ended_is_obeyed_afterwards(number: signal.Signals) -> None:
    ended = False
    with pytest.raises((KeyboardInterrupt, SystemExit)), stop_on_signals():
        with undisturbed():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            ended = True
        raise AssertionError("it went on")
    assert ended


def test_what_is_ignored_stays_so() -> None:
    """As under `nohup`: neither is it taken for the request that came first."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as caught, stop_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            with undisturbed():
                os.kill(os.getpid(), signal.SIGHUP)
                os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 75
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_of_many_decides() -> None:
    with pytest.raises(SystemExit) as caught, stop_on_signals(), undisturbed():
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert caught.value.code == 129


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, SystemExit(75)])
def test_a_command_that_is_stopping_already_is_not_disturbed(stopped: BaseException) -> None:
    ended = False
    with pytest.raises(SystemExit) as later, stop_on_signals():
        try:
            raise stopped
        except STOPPED:
            with undisturbed():
                for number in ALL:
                    os.kill(os.getpid(), number)
            ended = True
        os.kill(os.getpid(), signal.SIGHUP)
    assert ended
    assert later.value.code == 129, "what comes after the block is heard again"


def test_a_stop_that_was_obeyed_before_is_not_obeyed_twice() -> None:
    with stop_on_signals(), undisturbed(stopping=True):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_failure_on_its_way_gives_way_to_a_stop() -> None:
    """Else the stage that failed would be tried again."""
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        try:
            raise OSError
        finally:
            with undisturbed():
                os.kill(os.getpid(), signal.SIGINT)
