"""An attempt at training one configuration in a worker: from its newest stored state on, a rung at a time.

Whatever fails here is a result, too: see `what_ended`.
"""

import contextlib
import gc
import io
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from search.checkpoints import Stored
from search.spec import Params, StudySpec
from vae.adversarial import make_trainer
from vae.data import Dataset
from vae.training import Diverged, Trainer

STEP_S = 2.0
"""Training pauses at the next rung or after about this long, whichever is first: nothing is decided in between, and
a pause costs some 15 ms."""

BEATS_A_TIMEOUT = 10
"""While training moves on, the store hears of it this often in the time after which a trial counts as stalled."""

TRACEBACK_LINES = 6

NO_MEMORY = (  # in what torch says, but for torch.OutOfMemoryError
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Ended:
    """How it ended, in the words of the ledger. `step` and `layer`: where it diverged."""

    status: str
    reason: str | None = None
    step: int | None = None
    layer: str | None = None


class Attempt:
    """One configuration in training. `number`: by which the store knows its states."""

    def __init__(
        self,
        spec: StudySpec,
        data: Dataset,
        store: Any,
        *,
        number: int,
        params: Params,
        seed: int,
        gpus: float,
        is_first: bool = False,
        keep_below: float = math.inf,
    ) -> None:
        """is_first: no attempt at it was made before, so that there is no state to look for. keep_below: a last
        state with a higher objective is nobody's."""
        self.number = number
        self.trainer: Trainer | None = None
        self.history: list[dict[str, Any]] = []  # every epoch of the trial, those of earlier attempts too
        self.probes: list[dict[str, Any]] = []  # diagnostics before training, at rungs and at the end, likewise
        self.from_epoch: int | None = None  # where this attempt began
        self.damaged = ""  # what was wrong with newer states
        self.rows_scored = 0  # by whoever has more to do with the model than to train it
        self._spec, self._data, self._store = spec, data, store
        self._params, self._seed = params, seed
        self._device = "cuda" if gpus and torch.cuda.is_available() else "cpu"
        self._is_first, self._keep_below = is_first, keep_below
        self._rungs = set(spec.rungs())

    @property
    def is_final(self) -> bool:
        return self.trainer is not None and self.trainer.epoch >= self._spec.budget.max_epochs

    @property
    def progress(self) -> tuple[int, int, int] | None:
        """Changes whenever something moves; may be read from another thread."""
        return None if self.trainer is None else (self.number, self.trainer.steps, self.rows_scored)

    def advance(self) -> None:
        """Train to the next rung, or for a while. The first time from a stored state does not train.

        For a state is a rung's, where the trial may not have been judged yet.
        """
        if self.trainer is None:
            self._begin()
            if self.from_epoch:
                return
        self._train()

    def collapse(self) -> str | None:
        """Why the finished model is of no use, or None: its latents carry nothing."""
        assert self.trainer is not None
        last, baseline = self.history[-1], self.trainer.no_latent_nelbo
        if last["active_units"] == 0:
            return "no active latent unit"
        if self.trainer.config.objective == "elbo" and last["val_nelbo"] >= baseline:
            return f"no better than a model without latents ({baseline:.2f} nats)"
        return None

    def _begin(self) -> None:
        """Build the model, or go on from its newest stored state that can be read."""
        import ray  # here, since whoever trains a trial again needs none

        if self._spec.train.compile != "none":
            gc.collect()  # what was compiled for the trial before holds its model, and its memory on the device
        damaged: list[str] = []
        while True:
            trainer = make_trainer(
                self._spec.model_config_for(self._params, self._data.row_shape),
                self._spec.train_config_for(self._params),
                self._data,
                seed=self._seed,
                device=self._device,
            )
            stored = Stored(0, None, "") if self._is_first else ray.get(self._store.newest.remote(self.number))
            damaged += [stored.damaged] if stored.damaged else []
            if stored.state is None:
                break
            try:
                state = torch.load(io.BytesIO(stored.state), weights_only=True, map_location="cpu")
                trainer.load_state_dict(state["trainer"])
                self.history, self.probes = state["history"], state["probes"]
                break
            except Exception as error:  # torch raises unrelated types for what it cannot read
                damaged.append(f"the state of epoch {stored.epoch} could not be loaded: {error}")
                ray.get(self._store.remove.remote(self.number, stored.epoch))
        self.trainer, self.from_epoch, self.damaged = trainer, trainer.epoch, "; ".join(damaged)
        if trainer.epoch == 0:
            self._probe()

    def _train(self) -> None:
        trainer = self.trainer
        assert trainer is not None
        started = time.monotonic()
        while not self.is_final:
            self.history.append(asdict(trainer.train_epoch()))
            if trainer.epoch in self._rungs or self.is_final:
                self._probe()
                if not self.is_final or self.history[-1]["objective"] <= self._keep_below:
                    self._store_state()
                break
            if time.monotonic() - started >= STEP_S:
                break

    def _probe(self) -> None:
        """Look at the model as it is; not where that takes more memory than its training."""
        assert self.trainer is not None
        try:
            self.probes.append(asdict(self.trainer.diagnose()))
        except Exception as error:
            if not ran_out_of_memory(error):
                raise

    def _store_state(self) -> None:
        import ray

        assert self.trainer is not None
        buffer = io.BytesIO()
        state = {"trainer": self.trainer.state_dict(), "history": self.history, "probes": self.probes}
        torch.save(state, buffer)
        # waited for: the driver, once it hears of this epoch, may want the state or drop it
        ray.get(self._store.put.remote(self.number, self.trainer.epoch, buffer.getvalue()))


class Heartbeat:
    """Tells the store now and then that an attempt moves on, as long as it does: an epoch may take hours."""

    def __init__(self, store: Any, stall_timeout_s: float) -> None:
        self.attempt: Attempt | None = None  # the one under way
        self._store, self._every_s = store, stall_timeout_s / BEATS_A_TIMEOUT
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="vaesearch-beat", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _beat(self) -> None:
        told: tuple[int, int, int] | None = None
        while not self._over.wait(self._every_s):
            now = None if self.attempt is None else self.attempt.progress
            if now is not None and now != told:
                self._store.beat.remote(now[0])
                told = now


def what_ended(error: Exception) -> Ended:
    """What an error in a worker is called: a fault of the code or the data is a result like others."""
    if isinstance(error, Diverged):
        return Ended("diverged", str(error), error.step, error.layer)
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Ended("oom" if ran_out_of_memory(error) else "error", "\n".join(lines[-TRACEBACK_LINES:]))


def is_of_the_machine(error: Exception) -> bool:
    """Whether the trial is to be tried in another worker: the store is gone, or a fault of a GPU, which stays with the
    process."""
    from ray.exceptions import RayError

    return isinstance(error, RayError) or (isinstance(error, torch.AcceleratorError) and not ran_out_of_memory(error))


def ended_by(error: Exception) -> Ended:
    """`what_ended`, for a worker. One that is of the machine is raised: it ends the worker."""
    if is_of_the_machine(error):
        raise error
    return what_ended(error)


def set_up_torch(cpus: int, gpus: float) -> None:
    """For a worker with so many CPUs and GPUs; of a share of one it takes no more memory than that."""
    torch.set_num_threads(cpus)
    torch.backends.cudnn.allow_tf32 = False  # of convolutions on a GPU: float32 is to mean float32
    if 0 < gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus)


def device_for(recorded: str | None) -> str:
    """The kind of device that a trial was trained on, if there is one here."""
    is_gpu = recorded is not None and recorded.startswith("cuda") and torch.cuda.is_available()
    return "cuda" if is_gpu else "cpu"


@contextlib.contextmanager
def threads_for(spec: StudySpec, device: str) -> Iterator[None]:
    """As many threads as a trial of the study has; afterwards as many as before."""
    before = torch.get_num_threads()
    set_up_torch(spec.resources.cpus_per_trial, float(device != "cpu"))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def visible_gpus(gpus: float) -> list[str]:
    """The devices that Ray left to this worker, which asked for so many."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if gpus else ""
    return [name for name in visible.split(",") if name]


def train_wall_s(history: list[dict[str, Any]]) -> float:
    return math.fsum(epoch["wall_s"] for epoch in history)


def ran_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
