"""Where workers leave the state of their trials: one file a trial, in the study's folder, on the driver's machine.

`CheckpointStore` runs as an actor there, so that workers elsewhere need no shared filesystem; the driver
itself reads the same files. What the bytes mean is known to `search.trial` alone.
"""

import re
from pathlib import Path

from search.ledger import write_atomically


class CheckpointStore:
    """Keeps the last state of each trial, whole at every instant."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._attempts: dict[int, int] = {}

    def begin(self, trial: int) -> tuple[int, bytes | None]:
        """An attempt at a trial starts: how many there were since this store exists, and where to go on from."""
        self._attempts[trial] = self._attempts.get(trial, 0) + 1
        return self._attempts[trial], self.read(trial)

    def put(self, trial: int, state: bytes) -> None:
        """Replace the state of a trial."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(trial), state)

    def read(self, trial: int) -> bytes | None:
        try:
            return self._path(trial).read_bytes()
        except FileNotFoundError:
            return None

    def drop(self, trial: int) -> None:
        self._path(trial).unlink(missing_ok=True)

    def trials(self) -> list[int]:
        """The trials whose state is here."""
        names = (re.fullmatch(r"trial-(\d+)\.pt", path.name) for path in self.folder.glob("trial-*.pt"))
        return sorted(int(match[1]) for match in names if match)

    def clear(self) -> None:
        """Remove everything, the folder too."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()

    def _path(self, trial: int) -> Path:
        return self.folder / f"trial-{trial:05d}.pt"
