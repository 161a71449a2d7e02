"""The Tune trainable: a thin shell round `vae.training`. It lives on in its worker from trial to trial."""

import io
import math
import threading
import time
import traceback
from dataclasses import asdict
from typing import Any

import ray
import torch
from ray import tune

from search.checkpoints import Stored
from search.spec import StudySpec
from vae.adversarial import make_trainer
from vae.data import Dataset
from vae.training import Diverged, Trainer

STEP_S = 1.0
"""A step ends at the next rung or after about this long, whichever is first: nothing is decided in between."""

BEATS_A_TIMEOUT = 10
"""While training moves on, the store hears of it this often in the time after which a trial counts as stalled."""

TRACEBACK_LINES = 6


class VaeTrial(tune.Trainable):
    """One configuration in training. Every result has the epochs since the last one, `final` and `status`."""

    def setup(  # type: ignore[override]  # with_parameters adds the keywords
        self, config: dict[str, Any], *, spec: StudySpec, data: Dataset, store: Any
    ) -> None:
        self._spec, self._data, self._store = spec, data, store
        self._rungs = set(spec.rungs())
        torch.set_num_threads(spec.resources.cpus_per_trial)
        torch.backends.cudnn.allow_tf32 = False  # of convolutions on a GPU: float32 is to mean float32
        self.reset_config(config)
        self._over = threading.Event()
        threading.Thread(target=self._beat_while_it_moves, name="vaesearch-beat", daemon=True).start()

    def cleanup(self) -> None:
        self._over.set()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this process. All that a trial changes is in its Trainer, which is new."""
        self._number: int = new_config["trial"]
        self._config = new_config
        self._trainer: Trainer | None = None
        self._history: list[dict[str, Any]] = []  # every epoch of the trial, those of earlier attempts too
        self._reported = 0  # of them
        self._probes: list[dict[str, Any]] = []  # diagnostics before training, at rungs and at the end, likewise
        self._probes_reported = 0
        self._from_epoch: int | None = None  # where this attempt began
        self._damaged = ""  # what was wrong with newer states
        return True

    def step(self) -> dict[str, Any]:
        status, reason = "ok", None
        diverged: Diverged | None = None
        try:
            if self._trainer is None:
                self._begin()
            self._train()
            if self._is_final and (reason := self._collapse()):
                status = "collapsed"
        except Diverged as error:
            status, reason, diverged = "diverged", str(error), error
        except Exception as error:  # a fault of the code or the data is a result too: nothing may be lost
            status = "oom" if _is_out_of_memory(error) else "error"
            lines = "".join(traceback.format_exception(error)).splitlines()
            reason = "\n".join(lines[-TRACEBACK_LINES:])
        where = {
            "step": None if diverged is None else diverged.step,
            "layer": None if diverged is None else diverged.layer,
        }
        return self._result(status, reason) | where

    def _begin(self) -> None:
        """Build the model, or go on from its newest stored state that can be read."""
        device = "cuda" if self._spec.resources.gpus_per_trial and torch.cuda.is_available() else "cpu"
        params = self._config["params"]
        damaged: list[str] = []
        while True:
            trainer = make_trainer(
                self._spec.model_config_for(params, self._data.row_shape),
                self._spec.train_config_for(params),
                self._data,
                seed=self._config["seed"],
                device=device,
            )
            stored: Stored = ray.get(self._store.newest.remote(self._number))
            damaged += [stored.damaged] if stored.damaged else []
            if stored.state is None:
                break
            try:
                state = torch.load(io.BytesIO(stored.state), weights_only=True, map_location="cpu")
                trainer.load_state_dict(state["trainer"])
                self._history, self._probes = state["history"], state["probes"]
                break
            except Exception as error:  # torch raises unrelated types for what it cannot read
                damaged.append(f"the state of epoch {stored.epoch} could not be loaded: {error}")
                ray.get(self._store.remove.remote(self._number, stored.epoch))
        self._trainer, self._from_epoch, self._damaged = trainer, trainer.epoch, "; ".join(damaged)
        if trainer.epoch == 0:
            self._probe()

    def _train(self) -> None:
        """Train to the next rung, or for about a second."""
        trainer = self._trainer
        assert trainer is not None
        started = time.monotonic()
        while not self._is_final:
            self._history.append(asdict(trainer.train_epoch()))
            if trainer.epoch in self._rungs or self._is_final:
                self._probe()
                self._store_state()
                break
            if time.monotonic() - started >= STEP_S:
                break

    def _probe(self) -> None:
        """Look at the model as it is; not where that takes more memory than its training."""
        assert self._trainer is not None
        try:
            self._probes.append(asdict(self._trainer.diagnose()))
        except Exception as error:
            if not _is_out_of_memory(error):
                raise

    def _store_state(self) -> None:
        assert self._trainer is not None
        buffer = io.BytesIO()
        state = {"trainer": self._trainer.state_dict(), "history": self._history, "probes": self._probes}
        torch.save(state, buffer)
        # waited for: the driver, once it hears of this epoch, may want the state or drop it
        ray.get(self._store.put.remote(self._number, self._trainer.epoch, buffer.getvalue()))

    def _beat_while_it_moves(self) -> None:
        """Tell the store now and then, as long as there is something new to tell: an epoch may take hours."""
        told: tuple[int, int] | None = None
        while not self._over.wait(self._spec.budget.stall_timeout_s / BEATS_A_TIMEOUT):
            trainer = self._trainer
            now = None if trainer is None else (self._number, trainer.steps)
            if now is not None and now != told:
                self._store.beat.remote(now[0])
                told = now

    def _collapse(self) -> str | None:
        """Why the finished model is of no use, or None: its latents carry nothing."""
        assert self._trainer is not None
        last, baseline = self._history[-1], self._trainer.no_latent_nelbo
        if last["active_units"] == 0:
            return "no active latent unit"
        if self._trainer.config.objective == "elbo" and last["val_nelbo"] >= baseline:
            return f"no better than a model without latents ({baseline:.2f} nats)"
        return None

    @property
    def _is_final(self) -> bool:
        return self._trainer is not None and self._trainer.epoch >= self._spec.budget.max_epochs

    def _result(self, status: str, reason: str | None) -> dict[str, Any]:
        trainer, history = self._trainer, self._history
        epochs, self._reported = history[self._reported :], len(history)
        probes, self._probes_reported = self._probes[self._probes_reported :], len(self._probes)
        final = self._is_final and status in ("ok", "collapsed")
        return {
            "epochs": epochs,
            "probes": probes,
            "epoch": history[-1]["epoch"] if history else 0,
            "objective": told(history[-1]) if history else math.inf,
            "no_latent_objective": trainer.no_latent_objective if trainer else None,
            "final": final,
            "status": status,
            "reason": reason,
            "from_epoch": self._from_epoch,
            "damaged": self._damaged or None,
            "num_parameters": trainer.model.num_parameters if trainer else None,
            "no_latent_nelbo": trainer.no_latent_nelbo if trainer else None,
            "device": str(trainer.device) if trainer else None,
            "train_wall_s": math.fsum(epoch["wall_s"] for epoch in history),
            "done": final or status != "ok",
        }


def told(epoch: dict[str, Any]) -> float:
    """What sampler and early stopping hear of an epoch."""
    return float(epoch["val_nelbo"] if epoch["objective"] is None else epoch["objective"])


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's on a CPU
