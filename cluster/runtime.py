"""Start a private Ray on this machine, or join a cluster that is there, and leave nothing behind."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

OBJECT_STORE_HEADROOM_BYTES = 128 * 2**20
HEAD_CHECK_EVERY_S = 3.0
HEAD_SILENT_S = 40.0  # Ray itself ends the process after 60

PRIVATE_ENVIRONMENT = {
    # Ray's name for it is older than its use: 0 makes every server of the node bind to loopback alone
    # (ray 2.60, _private/services.py: get_node_ip_address). tests/test_cluster_runtime.py reads the sockets back.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning on zero-GPU trials
}


@dataclass(frozen=True)
class Runtime:
    """A Ray that this process is connected to. Resources are the whole cluster's."""

    address: str  # "local" for a private one
    num_cpus: float
    num_gpus: float


@contextlib.contextmanager
def head_watched(on_lost: Callable[[str], None]) -> Iterator[None]:
    """In this block, `on_lost` is called from a thread when nobody has listened for long where our Ray's head was.

    Ray's calls (2.60) then wait without hearing a signal, and after a minute it ends the process from below Python.
    """
    import ray

    address = ray.get_runtime_context().gcs_address
    over = threading.Event()

    def watch() -> None:
        heard = time.monotonic()
        while not over.wait(HEAD_CHECK_EVERY_S):
            if _listens(address):
                heard = time.monotonic()
            elif time.monotonic() - heard >= HEAD_SILENT_S:
                on_lost(f"the Ray cluster at {address} is gone; with another one, the same command goes on")
                return

    threading.Thread(target=watch, name="vaesearch-head", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), HEAD_CHECK_EVERY_S).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def ray_runtime(
    address: str | None = None, *, data_bytes: int = 0, num_cpus: int | None = None, num_gpus: int | None = None
) -> Iterator[Runtime]:
    """Connect to Ray for the length of a `with` block; a Ray this process is connected to already is used as it is.

    address: None starts a private Ray on this machine, on loopback, behind a fresh token that is kept in
    memory; anything else joins the cluster there. data_bytes: what the object store must hold.
    """
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        yield _describe(ray, ray.get_runtime_context().gcs_address)
    elif address is None:
        with environment({**PRIVATE_ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            import ray
            from ray._private import ray_constants

            ray_constants.ENABLE_RAY_CLUSTER = False  # the variable above, for a process that had imported ray
            _read_authentication_again()
            options = {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "object_store_memory": OBJECT_STORE_HEADROOM_BYTES + 2 * data_bytes,
            }
            # "local", not None: that would join whatever RAY_ADDRESS names
            with _connected(ray, address="local", include_dashboard=False, **options):
                yield _describe(ray, "local")
    else:
        import ray

        _read_authentication_again()
        with _connected(ray, address=address):
            yield _describe(ray, address)


@contextlib.contextmanager
def _connected(ray, **options: object) -> Iterator[None]:  # type: ignore[no-untyped-def]
    before = {"PYTHONBREAKPOINT": os.environ.get("PYTHONBREAKPOINT")}  # ray.init sends breakpoint() to its debugger
    with _errors_logged(ray):
        try:
            with _our_handler_of_sigterm(ray), _idle_processes_spared(ray):
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            yield
        finally:
            ray.shutdown()
            _restore_environment(before)


def _errors_logged(ray) -> contextlib.AbstractContextManager[None]:  # type: ignore[no-untyped-def]
    """Keep Ray (2.60) from printing to stdout, where answers belong, what went wrong with a task."""
    return _replaced(
        ray._private.worker,
        print_to_stdstream=lambda data, ignore_prefix: log.debug("%s", "\n".join(data["lines"])),
    )


def _idle_processes_spared(ray) -> contextlib.AbstractContextManager[None]:  # type: ignore[no-untyped-def]
    """Keep ray.init (2.60) from starting three Python processes that serve nobody on a private Ray: for the dashboard
    (also without one), to scale the cluster, to print what workers print. They cost 3 s in all."""

    def spared(self: object, **options: object) -> None: ...

    return _replaced(ray._private.node.Node, start_api_server=spared, start_monitor=spared, start_log_monitor=spared)


@contextlib.contextmanager
def _our_handler_of_sigterm(ray) -> Iterator[None]:  # type: ignore[no-untyped-def]
    """Keep ray.init (2.60) from putting two of its own in place: Python's ends the driver with status 15, the
    one below Python writes a backtrace first."""
    try:
        with _replaced(ray._private.utils, set_sigterm_handler=lambda handler: None):
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def _replaced(owner: object, **attributes: object) -> Iterator[None]:
    """Of a module or class of Ray's, in this block."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _read_authentication_again() -> None:
    """Ray keeps the mode it found when it was imported, and the token of the first connection (ray 2.60)."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _describe(ray, address: str) -> Runtime:  # type: ignore[no-untyped-def]
    resources = ray.cluster_resources()
    return Runtime(address, resources.get("CPU", 0.0), resources.get("GPU", 0.0))


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes Ray starts, then put back what was there."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        _restore_environment(before)


def _restore_environment(before: dict[str, str | None]) -> None:
    for key, value in before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
