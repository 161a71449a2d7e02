"""Signals round a study: none is lost, also where something swallows the KeyboardInterrupt of a Ctrl-C."""

import os
import signal
import subprocess
import sys

import pytest

from search.interrupts import Interrupted, interrupts_caught

SWALLOWED = """
import os, signal
from search.interrupts import Interrupted, interrupts_caught, remember_interrupts
remember_interrupts()
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException as error:
    print(type(error).__name__)
try:
    with interrupts_caught():
        print("goes on")
except Interrupted as interrupted:
    print(interrupted.signum)
with interrupts_caught():
    print("the next one")
"""


def test_a_ctrl_c_that_an_import_swallowed_ends_the_study_that_follows_and_no_later_one():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], check=True, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["KeyboardInterrupt", "2", "the next one", ""]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_a_whole_state_where_it_is_deferred(signum):
    before = signal.getsignal(signum)
    with interrupts_caught() as interrupts:
        with interrupts.deferred():
            os.kill(os.getpid(), signum)
            assert interrupts.pending == signum
            with pytest.raises(Interrupted):
                interrupts.raise_if_pending()
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_elsewhere_a_signal_ends_the_study_at_once(signum):
    with pytest.raises(Interrupted) as caught, interrupts_caught():
        os.kill(os.getpid(), signum)
    assert caught.value.signum == signum
