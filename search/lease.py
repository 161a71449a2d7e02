"""One driver a study: a small file that says who holds it, and since when nothing was heard."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from search.ledger import write_atomically
from vae.config import InputError

STALE_AFTER_S = 60.0
HEARTBEAT_EVERY_S = 10.0


class LeaseHeld(InputError):
    """Another driver is at work on the study."""


class Lease:
    """Held from `acquire` to `release`; call `heartbeat` now and then."""

    def __init__(self, study_path: Path) -> None:
        self.path = study_path / "lease.json"
        self._last_beat = 0.0

    def check(self) -> None:
        """Raise LeaseHeld if a living driver holds the study."""
        try:
            holder = json.loads(self.path.read_text())
            host, pid, beat = holder["host"], int(holder["pid"]), float(holder["heartbeat"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return  # none
        age_s = time.time() - beat
        dead = host == socket.gethostname() and not _is_alive(pid)
        if not dead and age_s < STALE_AFTER_S and (host, pid) != (socket.gethostname(), os.getpid()):
            raise LeaseHeld(
                f"{self.path.parent} is being worked on by process {pid} on {host}, last heard {age_s:.0f} s ago; "
                f"wait for it, stop it, or use another --name"
            )

    def acquire(self) -> None:
        """Take the study. Raises LeaseHeld if a living driver has it."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # of two that start at once, the second sees the first one's lease
            self.check()
            write_atomically(self.path, self._content())
        finally:
            os.close(folder)
        self._last_beat = time.monotonic()

    def heartbeat(self) -> None:
        """Say that we are alive, at most every few seconds."""
        if time.monotonic() - self._last_beat >= HEARTBEAT_EVERY_S:
            self._last_beat = time.monotonic()
            write_atomically(self.path, self._content())

    def release(self) -> None:
        self.path.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}).encode()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
