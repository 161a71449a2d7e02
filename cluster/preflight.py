"""What must hold before the first trial: each node of a Ray cluster is asked, and what it says is judged.

`vaesearch doctor` shows these checks; a study that joins a cluster makes them before it starts.
"""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.head import is_loopback
from cluster.resources import PlacementError, fitting_trials, trials_on
from cluster.runtime import Node, Runtime
from cluster.tokens import MODE_VARIABLE, PATH_VARIABLE, TokenUnreadable, find_token, not_private

PATIENCE_S = 20.0  # for the slowest node; a new worker takes 1 to 5
TORCH_PATIENCE_S = 15.0  # of these, for a first import of torch
CLOCK_WARNING_S = 2.0
STORE_SHARE = 0.8  # of an object store, for the data; models on their way take their part too
WORDS_LISTED = 4  # nodes that are named in one line

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. what: also where; mend: what would do, unless all is well."""

    name: str
    verdict: Verdict
    what: str
    mend: str = ""


@dataclass(frozen=True)
class Asked:
    """What a trial asks for. gpus None: a share of a GPU where there is one, as small as was not measured yet."""

    cpus: int = 1
    gpus: float | None = 0.0
    at_once: int | None = None  # None: as many as fit
    is_growing: bool = False  # nodes come while trials wait

    def gpus_at_least(self, runtime: Runtime) -> float:
        return float(runtime.num_gpus > 0) if self.gpus is None else self.gpus


@dataclass(frozen=True)
class Torch:
    """What torch says on a node. error: why it says nothing."""

    version: str = ""
    cuda: str | None = None  # the version it was built for; None: for CPUs alone
    gpus: int = 0
    error: str = ""
    is_late: bool = False  # so far it says nothing: on a cold disk a first import may take a minute


@dataclass(frozen=True)
class Answer:
    """What a node says of itself."""

    python: str
    ray: str
    vaesearch: str | None  # None: not installed
    asks_for_token: bool
    shm_bytes: int | None  # None: there is no such thing
    torch: Torch | None  # None: was not asked, where there is no sign of a GPU
    clock_s: tuple[float, float] = (0.0, 0.0)  # ahead of the driver's by no less and no more than


@dataclass(frozen=True)
class Silence:
    """A node that brought no answer. is_broken: it did say that what it was sent fails there; a trial would, too."""

    reason: str
    is_broken: bool = False


Answers = Mapping[str, Answer | Silence]
"""By the id of the node."""


def check_nodes(
    runtime: Runtime, asked: Asked, *, data_bytes: int | None, patience_s: float = PATIENCE_S
) -> list[Check]:
    """All that can be said of a cluster that this process is connected to. Takes no longer than `patience_s`.

    data_bytes: what each node with trials gets a copy of; None: that is not known.
    """
    import ray

    answers = ask_nodes(runtime.nodes, patience_s)
    workers = [node for node in runtime.nodes if trials_on(node, asked.cpus, asked.gpus_at_least(runtime))]
    here = ray.get_runtime_context().get_node_id()
    holders = [node for node in runtime.nodes if node in workers or node.node_id == here]
    return [
        *check_answers(runtime, workers, answers, is_growing=asked.is_growing),
        *check_versions(runtime, answers),
        *check_package(workers, answers),
        *check_token(runtime, answers),
        *check_placement(runtime, asked),
        *check_gpus(workers, answers, are_asked_for=asked.gpus_at_least(runtime) > 0),
        *check_memory(holders, answers, data_bytes),
        *check_clocks(runtime, answers),
    ]


# ---- asking


def ask_nodes(nodes: Sequence[Node], patience_s: float = PATIENCE_S) -> dict[str, Answer | Silence]:
    """What each node says of itself, all at the same time."""
    deadline = time.monotonic() + patience_s
    look = _look()
    trips = _sent_to(nodes, look, [(node.num_gpus > 0,) for node in nodes], patience_s)
    answers = {node_id: _answer(trip) for node_id, trip in trips.items()}
    unsettled = [node for node, answer in _answered(nodes, answers) if max(map(abs, answer.clock_s)) > CLOCK_WARNING_S]
    left_s = deadline - time.monotonic()
    if unsettled and left_s > 0:  # for most of a trip a worker started; there is one now
        trips = _sent_to(unsettled, lambda: time.time(), [()] * len(unsettled), left_s)
        for node, answer in _answered(unsettled, answers):
            trip = trips[node.node_id]
            if isinstance(trip.value, float):
                answers[node.node_id] = replace(answer, clock_s=trip.ahead_s(trip.value))
    return answers


@dataclass(frozen=True)
class _Trip:
    """There and back: what it brought, or the exception; when it began and ended, by the driver's clock."""

    value: Any
    sent: float
    received: float

    def ahead_s(self, clock: float) -> tuple[float, float]:
        return clock - self.received, clock - self.sent


def _sent_to(
    nodes: Sequence[Node], function: Callable[..., object], arguments: Sequence[tuple[object, ...]], patience_s: float
) -> dict[str, _Trip]:
    """Call a function on each node. Who has not answered in time is not waited for: a task on a machine that is
    gone may hang for minutes (ray 2.60)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    sent, deadline = time.time(), time.monotonic() + patience_s
    pending, trips = {}, {}
    for node, given in zip(nodes, arguments, strict=True):
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        pending[task.options(scheduling_strategy=there).remote(*given)] = node.node_id
    while pending and (left_s := deadline - time.monotonic()) > 0:
        for reference in ray.wait(list(pending), timeout=left_s)[0]:
            received = time.time()
            try:
                value = ray.get(reference, timeout=1)
            except Exception as error:  # whatever befell it there
                value = error
            trips[pending.pop(reference)] = _Trip(value, sent, received)
    for reference, node_id in pending.items():
        ray.cancel(reference, force=True)
        trips[node_id] = _Trip(TimeoutError(f"no answer within {patience_s:.0f} s"), sent, time.time())
    return trips


def _answer(trip: _Trip) -> Answer | Silence:
    from ray.exceptions import RayTaskError

    if isinstance(trip.value, Exception):
        reason = " ".join(str(trip.value).split()) or type(trip.value).__name__
        return Silence(reason[-300:], is_broken=isinstance(trip.value, RayTaskError))
    said = dict(trip.value)
    torch = said.pop("torch")
    clock = said.pop("clock")
    return Answer(**said, torch=None if torch is None else Torch(**torch), clock_s=trip.ahead_s(clock))


def _look() -> Callable[[bool], dict[str, Any]]:
    """What runs on the nodes. It travels as it is, because it stands in a function: where it arrives, there may be
    nothing of ours to import."""

    torch_patience_s = TORCH_PATIENCE_S

    def look(has_gpus: bool) -> dict[str, Any]:
        import glob
        import importlib.metadata
        import json
        import os
        import platform
        import subprocess
        import sys
        import time

        import ray
        from ray._private.authentication.authentication_utils import is_token_auth_enabled

        def version() -> str | None:
            try:
                return importlib.metadata.version("vaesearch")
            except importlib.metadata.PackageNotFoundError:
                return None

        def shared_memory() -> int | None:
            try:
                found = os.statvfs("/dev/shm")
            except OSError:
                return None
            return found.f_frsize * found.f_blocks

        def devices_of_node() -> str | None:
            """Ray (2.60) may have hidden them from this worker after it began."""
            try:
                with open("/proc/self/environ", "rb") as file:
                    began = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
            except OSError:
                return None
            value = began.get(b"CUDA_VISIBLE_DEVICES")
            return None if value is None else value.decode()

        def torch() -> dict[str, Any] | None:
            """In a process of its own: trials may be given this worker, and CUDA remembers what it saw first."""
            if not has_gpus and not glob.glob("/dev/nvidia[0-9]*"):
                return None
            code = (
                "import json, torch\n"
                "said = [torch.__version__, torch.version.cuda, torch.cuda.device_count()]\n"
                "print(json.dumps(dict(zip(('version', 'cuda', 'gpus'), said))))"
            )
            seen = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
            devices = devices_of_node()
            if devices is not None:
                seen["CUDA_VISIBLE_DEVICES"] = devices
            try:
                done = subprocess.run(
                    [sys.executable, "-P", "-c", code],
                    env=seen,
                    capture_output=True,
                    text=True,
                    timeout=torch_patience_s,
                )
            except subprocess.TimeoutExpired:
                return {"error": f"no answer within {torch_patience_s:.0f} s", "is_late": True}
            if done.returncode:
                return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
            return json.loads(done.stdout.splitlines()[-1])

        return {
            "python": platform.python_version(),
            "ray": ray.__version__,
            "vaesearch": version(),
            "asks_for_token": is_token_auth_enabled(),
            "shm_bytes": shared_memory(),
            "torch": torch(),
            "clock": time.time(),
        }

    return look


# ---- judging


def check_answers(
    runtime: Runtime, workers: Sequence[Node], answers: Answers, *, is_growing: bool = False
) -> list[Check]:
    """A node that fell silent is a failure only where no other is left for its trials: a study under way outlives its
    loss, and must be able to go on beside it, too. workers: the nodes that can hold a trial."""
    silent = {node: answer for node in runtime.nodes if isinstance(answer := answers[node.node_id], Silence)}
    can_go_elsewhere = is_growing or any(node not in silent for node in workers)
    found: dict[tuple[Verdict, str], list[Node]] = {}
    for node, silence in silent.items():
        is_failure = node in workers and (silence.is_broken or not can_go_elsewhere)
        found.setdefault(("failed" if is_failure else "warning", silence.reason), []).append(node)
    mends: dict[Verdict, str] = {
        "failed": "end Ray there and start it again, or wait until the cluster has noticed that it is gone",
        "warning": "its trials go elsewhere; if it stays silent, end Ray there and start it again",
    }
    problems = [
        Check("nodes", verdict, f"{_named(nodes)}: {reason}", mends[verdict])
        for (verdict, reason), nodes in found.items()
    ]
    size = f"{_count(runtime.num_cpus, 'CPU')}, {_count(runtime.num_gpus, 'GPU')}"
    return problems or [Check("nodes", "ok", f"{_everywhere(runtime)}: {size}")]


def check_versions(runtime: Runtime, answers: Answers) -> list[Check]:
    """Ray's must be the same, as workers and driver speak a protocol of its own; of Python's the minor one, as
    functions travel in its byte code."""
    import ray

    def python_of(version: str) -> str:
        return ".".join(version.split(".")[:2])

    python = python_of(platform.python_version())
    problems = [
        *_unlike("Ray", ray.__version__, runtime.nodes, answers, lambda answer: answer.ray),
        *_unlike("Python", python, runtime.nodes, answers, lambda answer: python_of(answer.python)),
    ]
    return problems or [Check("versions", "ok", f"Ray {ray.__version__} and Python {python} on {_everywhere(runtime)}")]


def check_package(workers: Sequence[Node], answers: Answers) -> list[Check]:
    """workers: the nodes that can hold a trial."""
    ours = importlib.metadata.version("vaesearch")
    lacking = [node for node, answer in _answered(workers, answers) if answer.vaesearch is None]
    there = [node for node in workers if node not in lacking]
    problems = _unlike("vaesearch", ours, there, answers, lambda answer: str(answer.vaesearch))
    if lacking:
        mend = f"install vaesearch {ours} there, for the Python that runs Ray"
        problems.append(Check("versions", "failed", f"vaesearch is not installed on {_named(lacking)}", mend))
    if problems or not workers:
        return problems
    return [Check("versions", "ok", f"vaesearch {ours} wherever trials are placed")]


def check_token(runtime: Runtime, answers: Answers) -> list[Check]:
    """A cluster without a token that others can reach is a failure: whoever comes to its ports runs there what he
    likes. RAY_AUTH_MODE=disabled is how a user says that he knows; to loopback only this machine's own users come."""
    asks = {node: answer.asks_for_token for node, answer in _answered(runtime.nodes, answers)}
    open_nodes = [node for node in asks if not asks[node]]
    if open_nodes:
        is_inside = all(is_loopback(node.address) for node in runtime.nodes)
        return [_open(open_nodes, is_inside), *(_check_token_unasked() if len(open_nodes) == len(asks) else ())]
    if not asks:
        return check_token_file()
    return [Check("token", "ok", f"Ray asks for a token on {_everywhere(runtime)}"), *check_token_file()]


def check_token_file() -> list[Check]:
    """The token's file on this machine, if there is one. Others who can read it are a warning, as Ray (2.60) itself
    writes it so."""
    try:
        token = find_token()
    except TokenUnreadable as error:
        what, _, mend = str(error).partition("; ")
        return [Check("token", "failed", what, mend)]
    if token is None or token.path is None:
        return []
    fault = not_private(token)
    if fault is None:
        return [Check("token", "ok", f"{token.path} is its owner's alone")]
    return [Check("token", "warning", fault, f"chmod 600 {token.path}")]


def _check_token_unasked() -> list[Check]:
    """Who has a token takes it that the cluster asks for it, or means another cluster."""
    try:
        token = find_token()
    except TokenUnreadable:
        return []
    if token is None:
        return []
    mend = f"see that this is the cluster you mean; if it is, start Ray on every node with {MODE_VARIABLE}=token"
    return [Check("token", "warning", f"{token.origin} has a token here, the cluster asks for none", mend)]


def _open(nodes: Sequence[Node], is_inside: bool) -> Check:
    is_meant = os.environ.get(MODE_VARIABLE, "").strip().lower() == "disabled"
    reach = "every user of this machine" if is_inside else "whoever reaches its ports"
    what = f"Ray asks for no token on {_named(nodes)}: {reach} can run any program there"
    mend = (
        f"`ray get-auth-token --generate` makes one; start Ray on every node with {MODE_VARIABLE}=token and the "
        f"token's file in {PATH_VARIABLE}"
    )
    if is_inside or is_meant:
        return Check("token", "warning", what, mend)
    return Check("token", "failed", what, f"{mend}; to go on without, set {MODE_VARIABLE}=disabled here")


def check_placement(runtime: Runtime, asked: Asked) -> list[Check]:
    gpus = asked.gpus_at_least(runtime)
    try:
        at_once = fitting_trials(
            runtime,
            cpus_per_trial=asked.cpus,
            gpus_per_trial=gpus,
            wanted=asked.at_once,
            is_growing=asked.is_growing,
        )
    except PlacementError as error:
        what, _, mend = str(error).partition("; ")
        return [Check("placement", "failed", what, mend)]
    room = {node: count for node in runtime.nodes if (count := trials_on(node, asked.cpus, gpus))}
    if asked.is_growing:
        what = f"{_count(at_once, 'trial')} at once, for which the cluster is to grow; there is room for"
        return [Check("placement", "ok", f"{what} {sum(room.values())} now")]
    least = "at least " if asked.gpus is None and gpus else ""
    share = f" and {gpus:g} GPU" if gpus else ""
    what = f"{least}{_count(at_once, 'trial')} at once, each with {_count(asked.cpus, 'CPU')}{share}"
    if len(runtime.nodes) == 1:
        return [Check("placement", "ok", what)]
    places = _listed([f"{count} on {_label(node)}" for node, count in room.items()])
    return [Check("placement", "ok", f"{what}; room for {places}")]


def check_gpus(workers: Sequence[Node], answers: Answers, *, are_asked_for: bool) -> list[Check]:
    """Whether a trial that Ray gives a GPU will find one. Where it does not, it trains on the CPU.

    workers: the nodes that can hold a trial. are_asked_for: trials ask for GPUs.
    """
    answered = list(_answered(workers, answers))
    found: dict[tuple[Verdict, str, str], list[Node]] = {}
    for node, answer in answered:
        problem = None if answer.torch is None else _gpu_problem(int(node.num_gpus), answer.torch, are_asked_for)
        if problem is not None:
            found.setdefault(problem, []).append(node)
    if found:
        return [
            Check("gpus", verdict, f"{_named(nodes)}: {what}", mend) for (verdict, what, mend), nodes in found.items()
        ]
    if not answered:
        return []
    count = sum(node.num_gpus for node, _ in answered)
    gpus = f"Ray and torch see the same {_count(count, 'GPU')}" if count else "no GPU where trials are placed"
    return [Check("gpus", "ok", gpus)]


def _gpu_problem(by_ray: int, torch: Torch, are_asked_for: bool) -> tuple[Verdict, str, str] | None:
    verdict: Verdict = "failed" if are_asked_for and by_ray and not torch.is_late else "warning"
    what = f"Ray sees {_count(by_ray, 'GPU')}"
    if torch.is_late:
        return verdict, f"{what}, torch cannot say yet: {torch.error}", "see that `import torch` works there"
    if torch.error:
        return verdict, f"{what}, torch cannot say: {torch.error}", "mend torch there"
    what += f", torch {torch.version} sees {torch.gpus or 'none'}"
    if by_ray < torch.gpus:
        return "warning", f"{what}: some stand idle", f"start Ray there with --num-gpus={torch.gpus}"
    if by_ray == torch.gpus:
        return None
    mend = "see what `nvidia-smi` says there; containers must be given their devices"
    if torch.cuda is None:  # somebody chose that torch, and may count GPUs that are none
        verdict, what = "warning", f"{what}, as it is built for CPUs"
        mend = "install a torch for CUDA there, or start Ray with --num-gpus=0"
    return verdict, f"{what}: trials would train on the CPU", mend


def check_memory(holders: Sequence[Node], answers: Answers, data_bytes: int | None) -> list[Check]:
    """holders: the nodes that get a copy of the data, the driver's among them."""
    problems = []
    if data_bytes is not None and (
        small := [node for node in holders if data_bytes > STORE_SHARE * node.object_store_bytes]
    ):
        least = min(node.object_store_bytes for node in small)
        what = f"the data take {_mib(data_bytes)}, the object store has {_mib(least)} on {_named(small)}"
        mend = f"start Ray there with --object-store-memory={int(data_bytes / STORE_SHARE) + 1} or more"
        problems.append(Check("memory", "failed", what, mend))
    slow = {
        node: answer.shm_bytes
        for node, answer in _answered(holders, answers)
        if answer.shm_bytes is not None and answer.shm_bytes < node.object_store_bytes
    }
    if slow:
        what = f"/dev/shm has {_mib(min(slow.values()))}, less than Ray's object store, on {_named(list(slow))}"
        mend = "enlarge it (of a container: --shm-size), or start Ray with a smaller --object-store-memory"
        problems.append(Check("memory", "warning", f"{what}: objects are kept in files under /tmp", mend))
    if problems or not holders:
        return problems
    least = min(node.object_store_bytes for node in holders)
    data = "" if data_bytes is None else f"the data take {_mib(data_bytes)}, "
    return [Check("memory", "ok", f"{data}Ray's object store has {_mib(least)}{' or more' * (len(holders) > 1)}")]


def check_clocks(runtime: Runtime, answers: Answers) -> list[Check]:
    """By what is certain: how far a clock is off at the least, however long the trip took.

    Never a failure: leases and times are the driver's alone, and which of the two clocks is wrong cannot be told.
    """
    off = {node: _off_s(answer.clock_s) for node, answer in _answered(runtime.nodes, answers)}
    wrong = {node: seconds for node, seconds in off.items() if abs(seconds) > CLOCK_WARNING_S}
    if not wrong:
        return [Check("clocks", "ok", f"clocks agree within {CLOCK_WARNING_S:g} s")] if len(off) > 1 else []
    shown = [f"{_label(node)} {abs(s):.0f} s {'ahead' if s > 0 else 'behind'}" for node, s in wrong.items()]
    mend = "set them by NTP; till then logs from there compare badly with the driver's, and with `ended_at`"
    return [Check("clocks", "warning", f"clocks differ from the driver's: {_listed(shown)}", mend)]


def _off_s(ahead_s: tuple[float, float]) -> float:
    low, high = ahead_s
    return low if low > 0 else min(high, 0.0)


# ---- words


def _answered(nodes: Sequence[Node], answers: Answers) -> Iterator[tuple[Node, Answer]]:
    for node in nodes:
        answer = answers[node.node_id]
        if isinstance(answer, Answer):
            yield node, answer


def _unlike(
    program: str, ours: str, nodes: Sequence[Node], answers: Answers, of: Callable[[Answer], str]
) -> list[Check]:
    """A failed check for each other version that was found."""
    found: dict[str, list[Node]] = {}
    for node, answer in _answered(nodes, answers):
        if of(answer) != ours:
            found.setdefault(of(answer), []).append(node)
    return [
        Check(
            "versions",
            "failed",
            f"{program} {theirs} on {_named(there)}, {ours} where the driver runs",
            f"install {program} {ours} there, or {theirs} here",
        )
        for theirs, there in found.items()
    ]


def _everywhere(runtime: Runtime) -> str:
    if runtime.address == "local":
        return "this machine"
    return "the cluster's one node" if len(runtime.nodes) == 1 else f"all {len(runtime.nodes)} nodes"


def _named(nodes: Sequence[Node]) -> str:
    return _listed([_label(node) for node in nodes])


def _listed(words: Sequence[str]) -> str:
    more = len(words) - WORDS_LISTED
    return ", ".join(words[:WORDS_LISTED]) + (f" and {more} more" if more > 0 else "")


def _label(node: Node) -> str:
    """Ray's short id tells apart what has one name, or is looked up in its dashboard."""
    return f"{node.host} ({node.address}, {node.node_id[:8]})"


def _count(number: float, thing: str) -> str:
    return f"{number:g} {thing}" + ("" if number == 1 else "s")


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:,.1f} MiB"
