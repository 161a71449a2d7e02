"""One driver a study: a small file that says who holds it, and since when nothing was heard."""

import json
import os
import socket
import time
from pathlib import Path

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
            return  # none, or torn by a crash in its very first write
        age_s = time.time() - beat
        dead = host == socket.gethostname() and not _is_alive(pid)
        if not dead and age_s < STALE_AFTER_S and (host, pid) != (socket.gethostname(), os.getpid()):
            raise LeaseHeld(
                f"{self.path.parent} is being worked on by process {pid} on {host}, last heard {age_s:.0f} s ago; "
                f"wait for it, stop it, or use another --name"
            )

    def acquire(self) -> None:
        """Take the study. Raises LeaseHeld if a living driver has it."""
        self.check()
        self.path.unlink(missing_ok=True)
        try:
            with open(self.path, "x") as file:  # of two that start at once, one gets here second
                file.write(self._content())
        except FileExistsError:
            self.check()
            raise LeaseHeld(f"{self.path.parent} was taken by another process at this moment") from None
        self._last_beat = time.monotonic()

    def heartbeat(self) -> None:
        """Say that we are alive, at most every few seconds."""
        if time.monotonic() - self._last_beat >= HEARTBEAT_EVERY_S:
            self._last_beat = time.monotonic()
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(self._content())
            os.replace(temporary, self.path)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)

    def _content(self) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()})


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
