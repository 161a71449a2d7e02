"""Writing in the background, and for how long a storage that refuses to be written is put up with.

A full disk or an unreachable object store must cost neither a trial nor a Ctrl-C its promptness, so the
driver's main thread never waits for the storage longer than it chooses to.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa

from search.interrupts import join_or_leave
from search.storage import Location, StorageFailed, reason_of, write_atomically

RETRY_EVERY_S = 1.0
CLOSE_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Write:
    """A file to be put in place. `encode` makes its content, in the writer's thread."""

    path: Location
    rank: int  # of what waits together, lower ranks are written first
    encode: Callable[[], "bytes | pa.Buffer"]


class BackgroundWriter:
    """Writes files in a thread of its own: of each file the newest content, lower ranks first, until it worked.

    To be closed by who is done with it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[Location, Write] = {}
        self._asked = self._done = 0  # calls of `put`
        self._thread: threading.Thread | None = None  # from the first `put` to `close`
        self._error: str | None = None
        self._closed = False
        self._broken: Exception | None = None  # a fault of ours, not of the storage
        self._retry_every_s = RETRY_EVERY_S

    @property
    def error(self) -> str | None:
        """Why the storage could not be written the last time; None if it could."""
        return self._error

    @property
    def is_idle(self) -> bool:
        """True when everything is in place."""
        return self._done >= self._asked

    def put(self, writes: Iterable[Write]) -> int:
        """Have files written soon, each in place of what still waits for it. Returns a ticket for `wait`."""
        with self._changed:
            if self._broken is not None:
                raise self._broken
            for write in writes:
                self._waiting[write.path] = write
            if not self._waiting:
                return self._asked
            self._asked += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vaesearch-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return self._asked

    def wait(self, ticket: int | None = None, timeout_s: float | None = None) -> bool:
        """Until what a ticket stands for (None: everything) is in place; False if it was not in time."""
        with self._changed:
            asked = self._asked if ticket is None else ticket
            self._changed.wait_for(lambda: self._done >= asked or self._broken is not None, timeout_s)
            if self._broken is not None:
                raise self._broken
            return self._done >= asked

    def close(self) -> None:
        """Give up what waits. A file that is being written at this moment may still come to be."""
        with self._changed:
            self._closed, self._waiting = True, {}
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            join_or_leave(thread, CLOSE_WAIT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = sorted(self._waiting.values(), key=lambda write: write.rank)
                self._waiting = {}
                asked = self._asked
            try:
                while batch and not self._closed:
                    write_atomically(batch[0].path, batch[0].encode())
                    del batch[0]
            except OSError as error:
                with self._changed:
                    self._error = reason_of(error)
                    self._waiting = {write.path: write for write in batch} | self._waiting
                    self._changed.wait_for(lambda: self._closed, self._retry_every_s)
            except Exception as error:
                with self._changed:
                    self._broken = error
                    self._changed.notify_all()
                    return
            else:
                with self._changed:
                    self._error = None
                    self._done = max(self._done, asked)
                    self._changed.notify_all()


class Patience:
    """Bears with a storage that cannot be written: says so once, says when it works again, gives up in the end."""

    def __init__(self, place: Location, limit_s: float, say: Callable[[str], None]) -> None:
        self.place, self.limit_s, self._say = place, limit_s, say
        self._since: float | None = None

    def look(self, errors: Iterable[str | None]) -> None:
        """Take what the writers say: of each, its error or None. Raises StorageFailed after `limit_s`."""
        reason = next((error for error in errors if error is not None), None)
        if reason is None:
            if self._since is not None:
                self._say(f"{self.place} is written again")
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()
            self._say(
                f"{self.place}: cannot be written: {reason}; training goes on, and writing is tried again "
                f"for {self.limit_s:g} s"
            )
        elif time.monotonic() - self._since >= self.limit_s:
            raise StorageFailed(self.place, reason)
