"""The entry point of a submitted study, on the head of the cluster: keeps `vaesearch run` running until it is done.

A driver that something ended by a signal goes on from the ledger, as after any crash. The results lie where the study
says; else where the cluster's VAESEARCH_STORAGE says; else in the home folder of the head.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from search.results import STUDY_FILE, Study
from search.spec import StudySpec
from search.storage import Location, location

VAESEARCH = (sys.executable, "-P", "-m", "search.cli")  # -P: no module of the working directory
STORAGE_VARIABLE = "VAESEARCH_STORAGE"
DEFAULT_STORAGE = "~/vaesearch-studies"
SUPERVISED_VARIABLE = "VAESEARCH_SUPERVISED"
"""The supervisor's process id, set for the driver: what its user typed to start that is another command."""

MAX_FRUITLESS_ENDS = 4
RESTART_AFTER_S = 1.0  # doubled with each end without progress
FORWARD_AFTER_S = 60.0
"""Longer than a driver takes to write all it knows: one that has heard the first signal leaves at once at a second."""
POLL_EVERY_S = 0.2
ON_PURPOSE = (signal.SIGTERM, signal.SIGINT)


def storage_on_cluster(asked: str | None) -> str:
    """Where a study's results lie, seen from the head. asked: what the study says, if it is a URL or absolute."""
    return asked or os.environ.get(STORAGE_VARIABLE) or str(Path(DEFAULT_STORAGE).expanduser())


def supervise(study_file: Path, storage: str | None, extend: int, say: Callable[[str], None]) -> int:
    """Run the study to its end; the exit status is the driver's, 128 + n after a signal n that was meant.

    Raises InputError.
    """
    return _Supervisor(study_file, storage_on_cluster(storage), extend, say).run()


def end_with_supervisor() -> None:
    """In the driver: ask it to end once the supervisor is gone, which kill -9 lets tell nobody.

    Left alone, it would hold the study's lease against the next submit. (Linux can send a signal then, but sends it
    once for each thread that the parent had, and a second one means: at once.)
    """
    if SUPERVISED_VARIABLE not in os.environ:
        return
    supervisor = int(os.environ[SUPERVISED_VARIABLE])

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(POLL_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="vaesearch-supervisor", daemon=True).start()


class _Supervisor:
    def __init__(self, study_file: Path, storage: str, extend: int, say: Callable[[str], None]) -> None:
        self._file, self._storage, self._say = study_file, storage, say
        self._path = location(storage) / StudySpec.load(study_file).name
        self._goal = _trials_asked(self._path) + extend if extend else 0
        self._signum: int | None = None
        self._signalled = threading.Event()

    def run(self) -> int:
        for signum in ON_PURPOSE:
            signal.signal(signum, self._on_signal)
        ended, fruitless = -1, 0
        while True:
            if self._signum is not None:
                return 128 + self._signum
            code = self._wait(self._start())
            if -code in ON_PURPOSE:  # it had no handlers yet
                self._say("interrupted before the driver was at work")
            if self._signum is not None or code >= 0 or -code in ON_PURPOSE:
                return code if code >= 0 else 128 - code
            before, ended = ended, _num_ended(self._path)
            fruitless = 1 if ended > before else fruitless + 1
            name = signal.Signals(-code).name
            if fruitless == MAX_FRUITLESS_ENDS:
                self._say(f"the driver was ended by {name}, {fruitless} times without a new trial; giving up")
                return 128 - code
            self._say(f"the driver was ended by {name}; starting it again")
            self._signalled.wait(RESTART_AFTER_S * 2 ** (fruitless - 1))

    def _start(self) -> subprocess.Popen[bytes]:
        missing = self._goal - _trials_asked(self._path) if self._goal else 0
        extension = ["--extend", str(missing)] if missing > 0 else []
        command = ["run", str(self._file), "--storage", self._storage, "--address", "auto", *extension]
        return subprocess.Popen([*VAESEARCH, *command], env=os.environ | {SUPERVISED_VARIABLE: str(os.getpid())})

    def _wait(self, driver: subprocess.Popen[bytes]) -> int:
        """Its return code. To stop a job, Ray (2.60) signals the driver as well, and a second signal would end that
        without its last rows; so ours is passed on only if the driver seems to have had none."""
        deadline: float | None = None
        while (code := driver.poll()) is None:
            if self._signum is not None and deadline is None:
                deadline = time.monotonic() + FORWARD_AFTER_S
            if deadline is not None and time.monotonic() > deadline:
                driver.send_signal(self._signum or signal.SIGTERM)
                return driver.wait()
            time.sleep(POLL_EVERY_S)
        return code

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        self._signalled.set()


def _trials_asked(path: Location) -> int:
    """Of the stored study; 0 where there is none."""
    return Study(path).spec.budget.trials if (path / STUDY_FILE).is_file() else 0


def _num_ended(path: Location) -> int:
    try:
        return sum(row.state != "RUNNING" for row in Study(path).rows()) if (path / STUDY_FILE).is_file() else 0
    except OSError:  # a storage that does not answer; the driver will tell
        return 0
