"""What happens in a study while it runs, for whoever wants to hear of it."""

from collections.abc import Callable

from search.spec import StudySpec
from search.tables import AttemptRow, EpochRow, FinalRow, TrialRow

Tell = Callable[[int, int, str], None]
"""Hears of how many of a total are done, and what is being done."""


def untold(done: int, total: int, note: str) -> None:
    """A Tell for whoever wants to hear nothing."""


class StudyEvents:
    """Override what matters. Called on the driver's main thread, after the ledger has it."""

    def search_started(self, spec: StudySpec, rows: list[TrialRow]) -> None:
        """The search is about to begin, or to go on from these trials."""

    def trial_started(self, row: TrialRow) -> None:
        """A suggestion is on disk and waits for a worker; also one that a former driver left."""

    def epochs_done(self, row: TrialRow, epochs: list[EpochRow]) -> None:
        """New epochs; the row has the figures of the last one."""

    def worker_lost(self, row: TrialRow, attempt: AttemptRow) -> None:
        """An attempt at a trial is over before its time. It is made again, unless there were too many."""

    def state_damaged(self, row: TrialRow, attempt: AttemptRow) -> None:
        """A trial goes on from an older state than its newest, which could not be read."""

    def trial_ended(self, row: TrialRow) -> None:
        """The row's state is COMPLETE, PRUNED or FAIL."""

    def confirmation_started(self, total: int, ended: int) -> None:
        """The search is over; finalists are trained anew, `total` runs in all."""

    def final_started(self, row: FinalRow) -> None:
        """A run waits for a worker; also one that is started again, then with what took the last one away."""

    def final_ended(self, row: FinalRow) -> None:
        """The row's state is COMPLETE or FAIL."""
