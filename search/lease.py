"""One driver a study: a small file that says who holds it, and since when nothing was heard."""

import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from search.storage import Location, write_atomically
from search.writer import Write
from vae.config import InputError

STALE_AFTER_S = 60.0
HEARTBEAT_EVERY_S = 10.0
SETTLE_S = 1.0  # remote storage has no lock: of two drivers that take a lease at once, the later write stands


class LeaseHeld(InputError):
    """Another driver is at work on the study."""


class Lease:
    """Held from `acquire` to `release`; call `heartbeat` now and then."""

    def __init__(self, study_path: Location) -> None:
        self.path = study_path / "lease.json"
        self._last_beat = 0.0
        self._me = _Holder(socket.gethostname(), os.getpid(), time.time(), _start_of(os.getpid()), _boot())

    def check(self) -> str | None:
        """Raise LeaseHeld if a living driver holds the study. Returns who left it without a word, or None.

        On this host the process tells whether it lives, however long it was stopped; elsewhere its heartbeat.
        """
        holder = self._holder()
        if holder is None:
            return None
        here = holder.host == self._me.host and holder.boot in (None, self._me.boot)
        if here and holder.pid == self._me.pid:
            return None
        age_s = time.time() - holder.heartbeat
        who = f"process {holder.pid} on {holder.host}, last heard {age_s:.0f} s ago"
        if _is_alive(holder) if here else age_s < STALE_AFTER_S:
            raise LeaseHeld(
                f"{self.path.parent} is being worked on by {who}; wait for it, stop it, or use another --name"
            )
        return who

    def acquire(self) -> str | None:
        """Take the study. Raises LeaseHeld if a living driver has it. Returns the dead one that it is taken from."""
        if isinstance(self.path, Path):
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)  # of two that start at once, the second sees the first one's lease
                former = self.check()
                write_atomically(self.path, self._content())
            finally:
                os.close(folder)
        else:
            former = self.check()
            write_atomically(self.path, self._content())
            time.sleep(SETTLE_S)
            self.check()
        self._last_beat = time.monotonic()
        return former

    @property
    def is_due(self) -> bool:
        """True when it is time for a heartbeat."""
        return time.monotonic() - self._last_beat >= HEARTBEAT_EVERY_S

    def heartbeat(self) -> Write:
        """The lease renewed, to be written ahead of all else. That raises LeaseHeld if somebody took the study."""
        self._last_beat = time.monotonic()
        return Write(self.path, -1, self._renewed)

    def _renewed(self) -> bytes:
        self.check()
        return self._content()

    def release(self) -> None:
        if self._holder() == self._me:
            self.path.unlink(missing_ok=True)

    def _holder(self) -> "_Holder | None":
        try:
            return _Holder(**json.loads(self.path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _content(self) -> bytes:
        return json.dumps(asdict(replace(self._me, heartbeat=time.time()))).encode()


@dataclass(frozen=True)
class _Holder:
    """A driver. Two with one process number are the same: a former one with the number of a living one is dead."""

    host: str
    pid: int
    heartbeat: float = field(compare=False)
    started: str | None = field(default=None, compare=False)  # tells a process from a later one, where known
    boot: str | None = None  # tells a machine from another one of the same name, where known


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(holder: _Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.started is None or _start_of(holder.pid) in (None, holder.started)
