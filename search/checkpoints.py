"""Where workers leave the state of their trials: in the study's folder, through one actor on the driver's machine.

So workers elsewhere need no shared filesystem and no credentials. What the bytes mean is known to
`search.attempt`, and to `search.publish`. `CheckpointStore` is the folder; `StoreServer` is what runs as the actor.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from search.storage import Location, RemotePath, location, reason_of, write_atomically

KEPT = 2  # states of a trial: the newest, and the one before, in case the newest cannot be read
SERVER_THREADS = 16  # so that a slow write of one trial's state keeps no other waiting

_NAME = re.compile(r"trial-(\d+)\.epoch-(\d+)\.pt")
_OWN = re.compile(rf"{_NAME.pattern}|\.{_NAME.pattern}\.tmp")  # and what `write_atomically` may leave behind
_MAGIC = b"vaesearch state 1\n"


class Stored(NamedTuple):
    """What was found of a trial. `damaged`: what was wrong with newer states, '' if nothing."""

    epoch: int  # 0: nothing
    state: bytes | None
    damaged: str


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What the driver wants to know now and then."""

    error: str | None  # why some states could not be written yet
    silent_s: dict[int, float]  # trial -> seconds since its worker was last heard


class CheckpointStore:
    """Keeps the last two states of each trial, each whole and checksummed. May be called from several threads."""

    def __init__(self, folder: str | Location) -> None:
        self.folder = location(folder)
        self.error: str | None = None
        self._lock = threading.Lock()
        self._epochs: dict[int, list[int]] = {}  # of the states on disk, ascending
        self._unwritten: dict[int, tuple[int, bytes]] = {}  # newest states that the disk would not take
        for path in self.folder.glob("trial-*.pt"):
            if match := _NAME.fullmatch(path.name):
                self._epochs.setdefault(int(match[1]), []).append(int(match[2]))
        for epochs in self._epochs.values():
            epochs.sort()

    def put(self, trial: int, epoch: int, state: bytes) -> None:
        """Keep a state. One that cannot be written stays in memory, and `error` is set until `retry` has written it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(trial, epoch), _sealed(state))
        except OSError as error:
            with self._lock:
                if self._unwritten_epoch(trial) <= epoch:  # a newer one may have come while this one was tried again
                    self._unwritten[trial] = (epoch, state)
                self.error = reason_of(error)
            return
        with self._lock:
            if self._unwritten_epoch(trial) <= epoch:
                self._unwritten.pop(trial, None)
            epochs = sorted({*self._epochs.get(trial, []), epoch})
            self._epochs[trial] = epochs[-KEPT:]
            if not self._unwritten:
                self.error = None
        self._unlink(trial, epochs[:-KEPT])

    def retry(self) -> None:
        """Write what could not be written before."""
        for trial, (epoch, state) in list(self._unwritten.items()):
            self.put(trial, epoch, state)
            if self.error is not None:
                return

    def newest(self, trial: int) -> Stored:
        """The newest state of a trial that can be read. A damaged one is replaced when its epoch comes round again."""
        damaged: list[str] = []
        if (unwritten := self._unwritten.get(trial)) is not None:
            return Stored(*unwritten, "")
        for epoch in reversed(self._epochs.get(trial, [])):
            try:
                return Stored(epoch, _opened(self._path(trial, epoch).read_bytes()), "; ".join(damaged))
            except (OSError, ValueError) as error:
                damaged.append(f"the state of epoch {epoch} could not be read: {reason_of(error)}")
        return Stored(0, None, "; ".join(damaged))

    def remove(self, trial: int, epoch: int) -> None:
        """Forget one state, which turned out to be of no use."""
        with self._lock:
            self._epochs[trial] = [known for known in self._epochs.get(trial, []) if known != epoch]
            if self._unwritten_epoch(trial) == epoch:
                del self._unwritten[trial]
        self._unlink(trial, [epoch])

    def drop(self, trial: int) -> None:
        """Forget a trial."""
        with self._lock:
            self._unwritten.pop(trial, None)
            epochs = self._epochs.pop(trial, [])
        self._unlink(trial, epochs)

    def trials(self) -> list[int]:
        """The trials of which there is a state."""
        return sorted({*self._unwritten, *(trial for trial, epochs in self._epochs.items() if epochs)})

    def clear(self) -> None:
        """Remove all states; the folder too, unless something else is in it."""
        self._epochs, self._unwritten = {}, {}
        if isinstance(self.folder, RemotePath):
            self.folder.remove_tree()
        elif self.folder.is_dir():
            for path in self.folder.iterdir():
                if _OWN.fullmatch(path.name) and not path.is_dir():
                    path.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _unwritten_epoch(self, trial: int) -> int:
        return self._unwritten[trial][0] if trial in self._unwritten else 0

    def _unlink(self, trial: int, epochs: list[int]) -> None:
        for epoch in epochs:
            with contextlib.suppress(OSError):  # what stays behind is in nobody's way, and goes with the study's end
                self._path(trial, epoch).unlink(missing_ok=True)

    def _path(self, trial: int, epoch: int) -> Location:
        return self.folder / f"trial-{trial:05d}.epoch-{epoch:05d}.pt"


@dataclass
class StoreServer:
    """The store as an actor, for the workers; it hears from them, too, that they are alive."""

    folder: str  # path or URL
    credentials: dict[str, str] = field(default_factory=dict, repr=False)  # variables that the folder needs

    def __post_init__(self) -> None:
        os.environ.update(self.credentials)
        self.store = CheckpointStore(self.folder)
        self._heard: dict[int, float] = {}

    def newest(self, trial: int) -> Stored:
        self.beat(trial)
        return self.store.newest(trial)

    def put(self, trial: int, epoch: int, state: bytes) -> None:
        self.beat(trial)
        self.store.put(trial, epoch, state)
        self.beat(trial)

    def remove(self, trial: int, epoch: int) -> None:
        self.store.remove(trial, epoch)

    def drop(self, trial: int) -> None:
        self._heard.pop(trial, None)
        self.store.drop(trial)

    def forget(self, trial: int) -> None:
        """Its worker is gone; it may be long until there is another one."""
        self._heard.pop(trial, None)

    def beat(self, trial: int) -> None:
        """A worker says that a trial moves on."""
        self._heard[trial] = time.monotonic()

    def report(self) -> StoreReport:
        """Tries again what could not be written, then tells."""
        self.store.retry()
        now = time.monotonic()
        return StoreReport(self.store.error, {trial: now - heard for trial, heard in list(self._heard.items())})


def _sealed(state: bytes) -> bytes:
    return b"".join((_MAGIC, hashlib.sha256(state).digest(), state))


def _opened(content: bytes) -> bytes:
    """The state in a file's content. Raises ValueError if it is not what was written."""
    digest, state = content[len(_MAGIC) : len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
    if not content.startswith(_MAGIC) or hashlib.sha256(state).digest() != digest:
        raise ValueError(f"its checksum does not fit its {len(content)} bytes")
    return state
