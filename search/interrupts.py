"""SIGINT and SIGTERM during a study: the first waits for a whole state, the second leaves at once.

Ray's own handlers end a driver with a backtrace, and Tune's returns from Ctrl-C as if all were well.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

LEFT_BEHIND = "vaesearch-left-behind"
"""The name of threads that hang for good: a process that has one is ended without waiting for it."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came, and everything is on disk."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


_swallowed: list[int] = []
"""A Ctrl-C that came before a study had its handlers. What is imported then may catch a KeyboardInterrupt and go on."""


def remember_interrupts() -> None:
    """From now on Ctrl-C also ends the next study, if something swallows the KeyboardInterrupt that it raises."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        _swallowed.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


class Interrupts:
    """Raises Interrupted at the first signal, or where a search is `deferred`, at its next step."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            os._exit(128 + signum)
        self.pending = signum
        if not self._deferred:
            self.raise_if_pending()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block, signals wait for a call of `raise_if_pending`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if_pending(self) -> None:
        if self.pending is not None:
            raise Interrupted(self.pending)


@contextlib.contextmanager
def interrupts_caught() -> Iterator[Interrupts]:
    """Our handlers, for the length of a study."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {signum: signal.signal(signum, interrupts) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        if _swallowed:
            raise Interrupted(_swallowed.pop())
        yield interrupts
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def join_or_leave(thread: threading.Thread, timeout_s: float) -> None:
    """Wait for a thread; one that hangs in a storage that does not answer is left behind, under a name that says so."""
    try:
        thread.join(timeout_s)
    finally:  # also where a Ctrl-C ends the wait
        if thread.is_alive():
            thread.name = LEFT_BEHIND
