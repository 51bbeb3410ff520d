from __future__ import annotations

import os
import signal

import pytest

from nemo_spin.selfplay.signals import stop_on_signals, undisturbed


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


def test_children_are_ended_undisturbed() -> None:
    with stop_on_signals():
        with undisturbed():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
