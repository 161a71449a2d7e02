"""Trials that no longer move: their workers are killed, so that their slots are free and the trials start again."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class _Watched:
    trial: int
    worker: Any
    since: float  # time.monotonic() when it got its worker
    is_killed: bool = False


class Watchdog:
    """Knows the workers of the trials under way. What they say of themselves comes from the checkpoint store."""

    def __init__(self, timeout_s: float, kill: Callable[[Any], None], *, knows_of_queues: bool = True) -> None:
        """knows_of_queues: `started` is called when there is a worker; False: who was never heard may be waiting."""
        self.timeout_s = timeout_s
        self._knows_of_queues = knows_of_queues
        self._kill = kill
        self._watched: dict[str, _Watched] = {}  # by Ray's id of the trial

    def started(self, trial_id: str, trial: int, worker: Any) -> None:
        self._watched[trial_id] = _Watched(trial, worker, time.monotonic())

    def ended(self, trial_id: str) -> None:
        self._watched.pop(trial_id, None)

    def look(self, silent_s: Mapping[int, float], before_kill: Callable[[str], None]) -> None:
        """Kill the workers that were not heard for too long. `silent_s`: trial -> seconds since it was heard."""
        now = time.monotonic()
        for trial_id, watched in self._watched.items():
            if not self._knows_of_queues and watched.trial not in silent_s:
                continue
            age_s = now - watched.since
            if not watched.is_killed and min(age_s, silent_s.get(watched.trial, age_s)) >= self.timeout_s:
                watched.is_killed = True
                before_kill(trial_id)
                self._kill(watched.worker)
