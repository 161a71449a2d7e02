"""What the driver does between two events of Tune: write, look after the workers and their states, hear signals."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.head import GIVEN_UP, ClusterUnreachable
from search.checkpoints import SERVER_THREADS, CheckpointStore, StoreReport, StoreServer
from search.events import StudyEvents
from search.interrupts import Interrupts
from search.lease import Lease
from search.ledger import Ledger
from search.results import exported
from search.spec import StudySpec
from search.storage import Location, credentials
from search.tables import TrialRow
from search.watchdog import Watchdog
from search.writer import Patience

REPORT_EVERY_S = 1.0  # how often the checkpoint store is asked how it is


class Rounds:
    """What the driver does between two events of Tune: write, look after the workers, listen for signals."""

    def __init__(
        self,
        ledger: Ledger,
        lease: Lease,
        server: Any,
        patience: Patience,
        interrupts: Interrupts,
        *,
        watchdog: Watchdog,
        stalled: Callable[[str], None],
        written: Callable[[], None],
    ) -> None:
        """stalled: hears of a worker that is about to be killed. written: called while all of the ledger is on disk."""
        self.watchdog = watchdog
        self._ledger, self._lease, self._server = ledger, lease, server
        self._stalled, self._written = stalled, written
        self._patience, self._interrupts = patience, interrupts
        self._report = StoreReport(None, {})
        self._asked: Any = None  # the reference of the next report
        self._asked_at = -math.inf

    def __call__(self) -> None:
        self._interrupts.raise_if_pending()
        if self._lease.is_due:
            self._ledger.writer.put([self._lease.heartbeat()])
        self._ledger.tick()
        if self._ledger.is_written:
            self._written()
        if self._hear_of_the_store():
            self.watchdog.look(self._report.silent_s, self._stalled)
        self._patience.look([self._ledger.error, self._report.error])

    def finish(self) -> None:
        """Until the tables and all states are on disk."""
        self._asked, self._asked_at = None, -math.inf  # a report from now on
        while True:
            self._interrupts.raise_if_pending()
            is_heard = self._hear_of_the_store(wait_s=0.1)
            is_written = self._ledger.flush(timeout_s=0.1)
            if is_heard and is_written and self._report.error is None:
                return
            self._patience.look([self._ledger.error, self._report.error])

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks and what they refer to, and we never read that back

    def _hear_of_the_store(self, wait_s: float = 0.0) -> bool:
        """True when there is a new report. The store may be slow: the search never waits for it."""
        import ray

        if self._asked is None and time.monotonic() - self._asked_at >= REPORT_EVERY_S:
            self._asked, self._asked_at = self._server.report.remote(), time.monotonic()
        if self._asked is None or not ray.wait([self._asked], timeout=wait_s)[0]:
            return False
        try:
            self._report, self._asked = ray.get(self._asked), None
        except ray.exceptions.RayActorError as error:
            raise ClusterUnreachable(GIVEN_UP) from error
        return True


@contextlib.contextmanager
def store_server(folder: Location) -> Iterator[Any]:
    """The checkpoint store of a folder as an actor on this machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_concurrency": SERVER_THREADS, "max_restarts": -1, "max_task_retries": -1}
    remote_store = ray.remote(StoreServer).options(num_cpus=0, scheduling_strategy=here, **options)
    if isinstance(folder, Path):
        folder = folder.absolute()  # on a cluster that we joined, the actor has a working directory of its own
    server: Any = remote_store.remote(str(folder), credentials(folder))
    try:
        yield server
    finally:
        ray.kill(server)


class BestStates(StudyEvents):
    """Keeps the stored states of the best trials and of those under way, and drops the rest.

    Not before the ledger on disk says that a trial has ended: until then a crash would have it go on from there.
    """

    def __init__(self, spec: StudySpec, rows: list[TrialRow], store: CheckpointStore) -> None:
        self.server: Any = None
        self._spec = spec
        self._unneeded: set[int] = set()  # trials
        self._kept = exported(spec, rows)
        needed = {row.trial for row in self._kept} | {row.trial for row in rows if row.state == "RUNNING"}
        for trial in store.trials():
            if trial not in needed:
                store.drop(trial)

    def trial_ended(self, row: TrialRow) -> None:
        candidates = {kept.trial for kept in self._kept} | {row.trial}
        self._kept = exported(self._spec, [*self._kept, row])
        self._unneeded |= candidates - {kept.trial for kept in self._kept}

    def keep_below(self, row: TrialRow) -> float:
        """The objective above which the weights of a trial are of no use, whatever others come to."""
        if not self._spec.num_exported:
            return -math.inf
        others = self._kept[-1:] if len(self._kept) == self._spec.num_exported else []
        if self._spec.goal == "compare-activations":  # only the best of each is kept
            others = others + [kept for kept in self._kept if kept.activations == row.activations]
        return min((other.ranks_by for other in others if other.ranks_by is not None), default=math.inf)

    def drop_unneeded(self) -> None:
        """To be called while all that the ledger knows of trials is on disk."""
        for trial in self._unneeded:
            self.server.drop.remote(trial)  # not waited for
        self._unneeded.clear()


def is_out_of_memory(error: BaseException | None) -> bool:
    """True where Ray killed a worker because its node ran out of memory."""
    from ray.exceptions import OutOfMemoryError

    return isinstance(error, OutOfMemoryError) or "low on memory" in str(error)


def one_line(error: BaseException | None) -> str:
    """What took a worker away, in a line: the first that Ray says, or what was raised there."""
    from ray.exceptions import RayTaskError

    lines = [line.strip() for line in str(error or "its worker was lost").splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1 if isinstance(error, RayTaskError) else 0]
