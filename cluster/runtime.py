"""Start a private Ray on this machine, or join a cluster that is there, and leave nothing behind."""

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.head import ClusterUnreachable, asks_for_token, find_head, host_and_port, is_loopback

log = logging.getLogger(__name__)

OBJECT_STORE_HEADROOM_BYTES = 128 * 2**20
LONGEST_REASON = 300  # characters of what Ray says

# Ray's name for it is older than its use: 0 makes every server of a node bind to loopback alone
# (ray 2.60, _private/services.py: get_node_ip_address). tests/test_cluster_runtime.py reads the sockets back.
LOOPBACK_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

PRIVATE_ENVIRONMENT = {
    **LOOPBACK_ALONE,
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning on zero-GPU trials
    # What nobody reads where there is no dashboard: a third of what Ray's processes take of the cores.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_enable_timeline": "0",
}


@dataclass(frozen=True)
class Node:
    """A living machine of the cluster, with what it offers in all, used or not."""

    node_id: str  # hexadecimal
    host: str
    address: str  # IP
    num_cpus: float
    num_gpus: float = 0.0
    object_store_bytes: float = 0.0


@dataclass(frozen=True)
class Runtime:
    """A Ray that this process is connected to."""

    address: str  # "local" for a private one
    nodes: tuple[Node, ...]

    @property
    def num_cpus(self) -> float:
        return sum(node.num_cpus for node in self.nodes)

    @property
    def num_gpus(self) -> float:
        return sum(node.num_gpus for node in self.nodes)


@contextlib.contextmanager
def ray_runtime(
    address: str | None = None, *, data_bytes: int = 0, num_cpus: int | None = None, num_gpus: int | None = None
) -> Iterator[Runtime]:
    """Connect to Ray for the length of a `with` block; a Ray this process is connected to already is used as it is.

    address: None starts a private Ray on this machine, on loopback, behind a fresh token that is kept in
    memory; anything else joins the cluster there. data_bytes: what the object store must hold.
    """
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        yield _describe()
    elif address is None:
        with environment({**PRIVATE_ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            import ray

            _read_authentication_again()
            options = {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "object_store_memory": OBJECT_STORE_HEADROOM_BYTES + 2 * data_bytes,
            }
            # "local", not None: that would join whatever RAY_ADDRESS names
            with _on_loopback(), _connected(ray, address="local", include_dashboard=False, **options):
                yield Runtime("local", living_nodes())
    else:
        found = find_head(address)
        # Ray (2.60) does not look for a token when it joins a cluster, and with one where none is asked for it ends
        # up with workers that are not let in.
        asked = "RAY_AUTH_MODE" not in os.environ and asks_for_token(found)
        with environment({"RAY_AUTH_MODE": "token"} if asked else {}):
            import ray

            _read_authentication_again()
            with _joined(ray, found):
                yield _describe()


@contextlib.contextmanager
def _joined(ray, address: str) -> Iterator[None]:  # type: ignore[no-untyped-def]
    with contextlib.ExitStack() as stack:
        try:
            if is_loopback(host_and_port(address)[0]):
                stack.enter_context(_on_loopback())  # else Ray would look for it at this machine's other address
            stack.enter_context(_connected(ray, address=address))
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())[:LONGEST_REASON]
            raise ClusterUnreachable(
                f"the Ray cluster at {address} cannot be joined: {reason}\n"
                f"this must be a machine of the cluster, with the same versions of Ray and Python; "
                f"from outside there is `vaesearch submit --address http://HOST:8265`"
            ) from error
        yield


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Servers of this process, and of those that it starts, bind to loopback alone."""
    from ray._private import ray_constants

    with environment(LOOPBACK_ALONE), replaced(ray_constants, ENABLE_RAY_CLUSTER=False):
        yield


@contextlib.contextmanager
def _connected(ray, **options: object) -> Iterator[None]:  # type: ignore[no-untyped-def]
    before = {"PYTHONBREAKPOINT": os.environ.get("PYTHONBREAKPOINT")}  # ray.init sends breakpoint() to its debugger
    with _errors_logged(ray):
        try:
            with _our_handler_of_sigterm(ray), _idle_processes_spared(ray):
                ray.init(log_to_driver=False, logging_level=logging.ERROR, job_config=_job_config(ray), **options)
            yield
        finally:
            ray.shutdown()
            _restore_environment(before)


class _NoFolders(list[str]):
    """Stays empty, whatever is added."""

    def extend(self, folders: object) -> None: ...


def _job_config(ray) -> Any:  # type: ignore[no-untyped-def]
    """Keep Ray (2.60) from having workers import from the driver's working directory first: a user's vae.py or
    random.py there would be taken for the module of that name."""
    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _NoFolders()
    return config


def _errors_logged(ray) -> contextlib.AbstractContextManager[None]:  # type: ignore[no-untyped-def]
    """Keep Ray (2.60) from printing to stdout, where answers belong, what went wrong with a task."""
    return replaced(
        ray._private.worker,
        print_to_stdstream=lambda data, ignore_prefix: log.debug("%s", "\n".join(data["lines"])),
    )


def _idle_processes_spared(ray) -> contextlib.AbstractContextManager[None]:  # type: ignore[no-untyped-def]
    """Keep ray.init (2.60) from starting three Python processes that serve nobody on a private Ray: for the dashboard
    (also without one), to scale the cluster, to print what workers print. They cost 3 s in all."""

    def spared(self: object, **options: object) -> None: ...

    return replaced(ray._private.node.Node, start_api_server=spared, start_monitor=spared, start_log_monitor=spared)


@contextlib.contextmanager
def _our_handler_of_sigterm(ray) -> Iterator[None]:  # type: ignore[no-untyped-def]
    """Keep ray.init (2.60) from putting two of its own in place: Python's ends the driver with status 15, the
    one below Python writes a backtrace first."""
    try:
        with replaced(ray._private.utils, set_sigterm_handler=lambda handler: None):
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
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


def _describe() -> Runtime:
    import ray

    return Runtime(ray.get_runtime_context().gcs_address, living_nodes())


def living_nodes() -> tuple[Node, ...]:
    """Those of the Ray that this process is connected to, as they are now."""
    import ray

    return tuple(_node(node) for node in ray.nodes() if node["Alive"])


def _node(node: dict[str, Any]) -> Node:
    resources = node["Resources"]
    return Node(
        node["NodeID"],
        node["NodeManagerHostname"],
        node["NodeManagerAddress"],
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        object_store_bytes=resources.get("object_store_memory", 0.0),
    )


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
