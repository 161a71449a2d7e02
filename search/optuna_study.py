"""A study as a plain `optuna.Study`, for whatever reads one: plots, importances, optuna-dashboard."""

import importlib.util
import socket
import threading
from collections.abc import Callable

import optuna

from search.arm import curves_of, frozen_trial
from search.interrupts import join_or_leave
from search.results import Study
from search.space import Space
from search.storage import reason_of
from vae.config import InputError

MIRROR_EVERY_S = 5.0
SHOWN = ("trial", "status", "reason", "epochs", "val_nelbo", "val_recon", "val_kl", "active_units", "train_wall_s")
"""What of a trial's row is a user attribute of Optuna's: its number there differs where one before it still runs."""


def to_optuna(study: Study, storage: str | optuna.storages.BaseStorage | None = None) -> optuna.Study:
    """All trials that have ended, each with its curve and with what made it one to avoid, as a new study of Optuna's.

    Changes nothing of ours. storage: as of `optuna.create_study`, which raises DuplicatedStudyError if it has a study
    of the name; None: in memory.
    """
    target = optuna.create_study(study_name=study.name, storage=storage, direction="minimize")
    _mirror(study, target, set())
    return target


def serve_dashboard(study: Study, port: int, say: Callable[[str], None]) -> None:
    """optuna-dashboard on a mirror of a study, on loopback, until it is interrupted; it follows a study that runs.

    Raises InputError where the package is missing or the port is taken.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise InputError("the dashboard needs optuna-dashboard: pip install 'vaesearch[dashboard]'")
    from optuna_dashboard import run_server

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        raise InputError(f"port {port}: {error.strerror or error}; name another with --port") from None
    storage, over, mirrored = optuna.storages.InMemoryStorage(), threading.Event(), set[int]()
    target = optuna.create_study(study_name=study.name, storage=storage, direction="minimize")
    _mirror(study, target, mirrored)

    def follow() -> None:
        while not over.wait(MIRROR_EVERY_S):
            try:
                _mirror(study, target, mirrored)
            except Exception as error:  # of a storage that does not answer just now: the next round tries again
                say(f"{study.name}: could not be read again: {reason_of(error)}")

    follower = threading.Thread(target=follow, name="vaesearch-mirror", daemon=True)
    follower.start()
    say(f"{study.name}: http://127.0.0.1:{port}/ until Ctrl-C; what is changed there changes the mirror alone")
    try:
        run_server(storage, host="127.0.0.1", port=port)
    finally:
        over.set()
        join_or_leave(follower, 1.0)


def _mirror(study: Study, target: optuna.Study, known: set[int]) -> None:
    """Adds the trials that have ended and are not known yet."""
    ended = [row for row in study.rows() if row.state != "RUNNING" and row.trial not in known]
    if not ended:
        return
    space, curves = Space(study.spec.space), curves_of(study.epochs())
    for row in ended:
        trial = frozen_trial(space, row, curves.get(row.trial, {}))
        for name in SHOWN:
            trial.set_user_attr(name, getattr(row, name))
        target.add_trial(trial)
        known.add(row.trial)
