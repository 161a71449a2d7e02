"""SIGINT and SIGTERM during a search: the first waits for a whole state, the second leaves at once.

Ray's own handlers end a driver with a backtrace, and Tune's returns from Ctrl-C as if all were well.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM came, and everything is on disk."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interrupts:
    """The first SIGINT or SIGTERM waits for the next step of the search; a second one leaves at once."""

    def __init__(self) -> None:
        self.pending: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            os._exit(128 + signum)
        self.pending = signum

    def raise_if_pending(self) -> None:
        if self.pending is not None:
            raise Interrupted(self.pending)


@contextlib.contextmanager
def interrupts_caught() -> Iterator[Interrupts]:
    """Our handlers in place of Ray's, which end the driver with a backtrace, for the length of a search."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {signum: signal.signal(signum, interrupts) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
