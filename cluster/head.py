"""The head of a Ray cluster: is it there, does it let us in, is it still there. Asked without joining."""

import contextlib
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.tokens import PATH_VARIABLE, Token, find_token

CONNECT_TIMEOUT_S = 5.0
HEAD_CHECK_EVERY_S = 3.0
HEAD_SILENT_S = 40.0  # Ray itself ends the process after 60
NO_HEAD = "start one with `ray start --head`, or give the address that it printed"
GIVEN_UP = "the Ray cluster has given this machine up, which was silent; join it again, and the same command goes on"
UNAUTHENTICATED = "UNAUTHENTICATED"
NO_TOKEN = f"set {PATH_VARIABLE} to a file that holds the token of this cluster"


class ClusterUnreachable(RuntimeError):
    """No Ray could be joined there. The text says where, why, and what would do."""


def is_loopback(host: str) -> bool:
    """True for a name or address that only this machine itself can mean."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_head(address: str) -> str:
    """The HOST:PORT at which a head answers and lets us in. address: HOST:PORT, or auto for the one of this machine.

    Raises ClusterUnreachable, in seconds. To find out as it joins takes Ray (2.60) half a minute, or many, and it
    tells of neither.
    """
    if "://" in address:
        raise ClusterUnreachable(
            f"{address} is not where a cluster is joined, which is HOST:PORT or auto, on a machine of it\n"
            f"from outside there is `vaesearch submit --address http://HOST:8265`"
        )
    from ray._private import services

    try:
        named = _of_this_machine() if address == "auto" else address
        canonical = None if named is None else services.canonicalize_bootstrap_address(named)
    except (ConnectionError, ValueError) as error:
        raise ClusterUnreachable(f"no Ray cluster at {address}: {error}\n{NO_HEAD}") from None
    if canonical is None or named is None:
        raise ClusterUnreachable(f"{address} is no cluster to join; without an address a private Ray starts here")
    reason = None
    for where in dict.fromkeys((canonical, named)):  # they differ where a head is on loopback alone
        reason = _refusal(where)
        if reason is None:
            return where
    raise ClusterUnreachable(f"the Ray cluster at {address if address == named else f'{address} ({named})'} {reason}")


@contextlib.contextmanager
def head_watched(on_lost: Callable[[str], None]) -> Iterator[None]:
    """In this block, `on_lost` is called from a thread when nobody has listened for long where our Ray's head was, or
    that head counts this machine among the dead.

    Ray's calls (2.60) then wait without hearing a signal, and after a minute it ends the process from below Python.
    """
    import ray

    context = ray.get_runtime_context()
    address, node_id = context.gcs_address, context.get_node_id()
    over = threading.Event()

    def watch() -> None:
        heard = time.monotonic()
        while not over.wait(HEAD_CHECK_EVERY_S):
            if _listens(address):
                heard = time.monotonic()
                if _is_given_up(address, node_id):
                    on_lost(GIVEN_UP)
                    return
            elif time.monotonic() - heard >= HEAD_SILENT_S:
                on_lost(f"the Ray cluster at {address} is gone; with another one, the same command goes on")
                return

    threading.Thread(target=watch, name="vaesearch-head", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _listens(address: str) -> bool:
    try:
        socket.create_connection(host_and_port(address), HEAD_CHECK_EVERY_S).close()
    except OSError:
        return False
    return True


def _is_given_up(address: str, node_id: str) -> bool:
    """True where the head there says that the node is dead. False may mean that it has not answered."""
    import grpc
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    request = CheckAliveRequest(node_ids=[bytes.fromhex(node_id)])
    with _channel(address) as channel:
        try:
            reply = NodeInfoGcsServiceStub(channel).CheckAlive(
                request, timeout=HEAD_CHECK_EVERY_S, metadata=_credentials(find_token())
            )
        except grpc.RpcError:
            return False
    return list(reply.raylet_alive) == [False]


def _of_this_machine() -> str | None:
    from ray._private import services

    if "://" in os.environ.get("RAY_ADDRESS", ""):  # a dashboard's, for `vaesearch submit`
        return services.find_bootstrap_address(None)
    return services.get_ray_address_from_environment("auto", None)


def host_and_port(address: str) -> tuple[str, int]:
    """Of HOST:PORT, where an IPv6 host stands in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def asks_for_token(address: str) -> bool:
    """Whether the head there, which answers, lets nobody in without one."""
    return _answer(address, None) == UNAUTHENTICATED


def _refusal(address: str) -> str | None:
    """Why the head there does not let us in, and what would do; None where it does."""
    token = find_token()
    answer = _answer(address, token)
    if answer is None:
        return None
    if answer != UNAUTHENTICATED:
        return f"does not answer: {answer}\n{NO_HEAD}"
    if token is None:
        return f"asks for a token and there is none here\n{NO_TOKEN}"
    return f"refuses the token of {token.origin}\n{NO_TOKEN}"


def _answer(address: str, token: Token | None) -> str | None:
    """None where the head there lets us in; UNAUTHENTICATED; or what is wrong."""
    import grpc
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with _channel(address) as channel:
        try:
            head = NodeInfoGcsServiceStub(channel)
            head.GetClusterId(GetClusterIdRequest(), timeout=CONNECT_TIMEOUT_S, metadata=_credentials(token))
        except grpc.RpcError as error:
            return UNAUTHENTICATED if error.code() == grpc.StatusCode.UNAUTHENTICATED else str(error.details())
    return None


def _credentials(token: Token | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token.value}"),)


def _channel(address: str) -> Any:
    """As Ray makes one: without a proxy, and with its certificates where it has some."""
    import grpc
    from ray._common.tls_utils import load_certs_from_env

    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    certificates, key, authority = load_certs_from_env()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificates), options)
