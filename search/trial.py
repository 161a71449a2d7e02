"""The Tune trainable: a thin shell round `search.attempt`. It lives on in its worker from trial to trial.

The driver names it without a need of torch, whose import takes a second: so `search.attempt` waits for `setup`.
"""

import math
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from search.spec import StudySpec
from vae.data import Dataset

if TYPE_CHECKING:
    from search.attempt import Ended


class VaeTrial(tune.Trainable):
    """One configuration in training. Every result has the epochs since the last one, `final` and `status`."""

    def setup(  # type: ignore[override]  # with_parameters adds the keywords
        self, config: dict[str, Any], *, spec: StudySpec, data: Dataset, store: Any
    ) -> None:
        from search.attempt import Heartbeat, set_up_torch, visible_gpus

        self._spec, self._data, self._store = spec, data, store
        set_up_torch(spec.resources.cpus_per_trial, config["gpus"])
        self._place = {
            "node_id": ray.get_runtime_context().get_node_id(),
            "gpus": config["gpus"],
            "gpu_ids": visible_gpus(config["gpus"]),
        }
        self._heartbeat = Heartbeat(store, spec.budget.stall_timeout_s)
        self.reset_config(config)

    def cleanup(self) -> None:
        self._heartbeat.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this process. All that a trial changes is in its Attempt, which is new."""
        from search.attempt import Attempt

        self._attempt = self._heartbeat.attempt = Attempt(
            self._spec,
            self._data,
            self._store,
            number=new_config["trial"],
            params=new_config["params"],
            seed=new_config["seed"],
            gpus=new_config["gpus"],
            is_first=new_config["is_first"],
            keep_below=new_config["keep_below"],
        )
        self._epochs_reported = self._probes_reported = 0  # of the attempt's
        return True

    def step(self) -> dict[str, Any]:
        from search.attempt import Ended, ended_by

        ended = Ended("ok")
        try:
            self._attempt.advance()
            if self._attempt.is_final and (reason := self._attempt.collapse()):
                ended = Ended("collapsed", reason)
        except Exception as error:  # nothing may be lost
            ended = ended_by(error)
        return self._result(ended)

    def _result(self, ended: "Ended") -> dict[str, Any]:
        from search.attempt import train_wall_s

        attempt = self._attempt
        trainer, history = attempt.trainer, attempt.history
        epochs, self._epochs_reported = history[self._epochs_reported :], len(history)
        probes, self._probes_reported = attempt.probes[self._probes_reported :], len(attempt.probes)
        final = attempt.is_final and ended.status in ("ok", "collapsed")
        return {
            "epochs": epochs,
            "probes": probes,
            "epoch": history[-1]["epoch"] if history else 0,
            "objective": history[-1]["objective"] if history else math.inf,
            "no_latent_objective": trainer.no_latent_objective if trainer else None,
            "final": final,
            "status": ended.status,
            "reason": ended.reason,
            "step": ended.step,
            "layer": ended.layer,
            "from_epoch": attempt.from_epoch,
            "damaged": attempt.damaged or None,
            "num_parameters": trainer.model.num_parameters if trainer else None,
            "no_latent_nelbo": trainer.no_latent_nelbo if trainer else None,
            "device": str(trainer.device) if trainer else None,
            **self._place,
            "train_wall_s": train_wall_s(history),
            "done": final or ended.status != "ok",
        }
