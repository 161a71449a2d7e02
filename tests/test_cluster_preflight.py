"""The checks of a cluster: what each makes of what the nodes brought, and the probe itself on real ones."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clusters import clean_environment, end_family

import cluster.preflight
from cluster.preflight import (
    Answer,
    Answers,
    Asked,
    Check,
    Silence,
    Torch,
    ask_nodes,
    check_answers,
    check_clocks,
    check_gpus,
    check_memory,
    check_nodes,
    check_package,
    check_placement,
    check_token,
    check_versions,
)
from cluster.runtime import Node, Runtime

GIB = 2**30
OURS = importlib.metadata.version("vaesearch")
HERE = Answer(
    python=platform.python_version(),
    ray=importlib.metadata.version("ray"),
    vaesearch=OURS,
    asks_for_token=True,
    shm_bytes=8 * GIB,
    torch=None,
)
CUDA = Torch(version="2.13.0+cu128", cuda="12.8", gpus=2)


def a_node(name: str, cpus: float = 4, gpus: float = 0, address: str = "10.0.0.5") -> Node:
    return Node(name.ljust(56, "0"), name, address, num_cpus=cpus, num_gpus=gpus, object_store_bytes=float(GIB))


HEAD, ONE, TWO = a_node("head", cpus=0), a_node("one"), a_node("two")
CLUSTER = Runtime("10.0.0.1:6379", (HEAD, ONE, TWO))


def all_say(runtime: Runtime = CLUSTER, answer: Answer | Silence = HERE, **others: Answer | Silence) -> Answers:
    """The same of every node, but for some by their names."""
    return {node.node_id: others.get(node.host, answer) for node in runtime.nodes}


def the_one(checks: list[Check]) -> Check:
    (check,) = checks
    return check


# ---- each check, by what the nodes brought


def test_all_is_well_where_every_node_says_what_the_driver_is(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # here; no token of this machine's user has a part in it
    answers = all_say()
    checks = [
        *check_answers(CLUSTER, [ONE, TWO], answers),
        *check_versions(CLUSTER, answers),
        *check_package([ONE, TWO], answers),
        *check_token(CLUSTER, answers),
        *check_placement(CLUSTER, Asked()),
        *check_gpus([ONE, TWO], answers, are_asked_for=False),
        *check_memory([ONE, TWO], answers, data_bytes=2**20),
        *check_clocks(CLUSTER, answers),
    ]
    assert {check.verdict for check in checks} == {"ok"}
    assert len(checks) == 8
    assert f"Ray {HERE.ray} and Python 3." in checks[1].what
    assert "on all 3 nodes" in checks[1].what


SILENT = Silence("no answer within 20 s")


def test_a_node_that_did_not_answer_is_a_warning_that_names_it_while_another_takes_its_trials():
    check = the_one(check_answers(CLUSTER, [ONE, TWO], all_say(two=SILENT)))
    assert (check.name, check.verdict) == ("nodes", "warning")
    assert check.what == "two (10.0.0.5, two00000): no answer within 20 s"
    assert "its trials go elsewhere" in check.mend


def test_where_no_node_that_can_hold_a_trial_answered_that_is_a_failure():
    check = the_one(check_answers(CLUSTER, [ONE, TWO], all_say(one=SILENT, two=SILENT)))
    assert check.verdict == "failed"
    assert "one (" in check.what
    assert "two (" in check.what
    assert check.mend


def test_a_silent_node_that_gets_no_trial_is_a_warning():
    assert the_one(check_answers(CLUSTER, [ONE, TWO], all_say(head=SILENT))).verdict == "warning"


def test_a_node_on_which_the_probe_itself_fails_is_a_failure_beside_others_that_answer():
    broken = Silence("TypeError: code() argument 13 must be str, not int", is_broken=True)
    assert the_one(check_answers(CLUSTER, [ONE, TWO], all_say(two=broken))).verdict == "failed"
    assert the_one(check_answers(CLUSTER, [ONE], all_say(two=broken))).verdict == "warning"


@pytest.mark.parametrize("nodes", [(HEAD,), (HEAD, ONE)])
@pytest.mark.parametrize("head", [HERE, SILENT])
def test_nothing_fails_in_a_cluster_that_is_to_grow_for_lack_of_workers(monkeypatch, nodes, head):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    runtime = Runtime("10.0.0.1:6379", nodes)
    answers = all_say(runtime, head=head, one=SILENT)
    asked = Asked(gpus=None, at_once=8, is_growing=True)
    checks = [
        *check_answers(runtime, nodes[1:], answers, is_growing=True),
        *check_versions(runtime, answers),
        *check_package(nodes[1:], answers),
        *check_token(runtime, answers),
        *check_placement(runtime, asked),
        *check_gpus(nodes[1:], answers, are_asked_for=True),
        *check_memory(nodes, answers, data_bytes=2**20),
        *check_clocks(runtime, answers),
    ]
    assert [check for check in checks if check.verdict == "failed"] == []


def test_what_a_silent_node_is_like_is_not_guessed():
    answers = all_say(two=SILENT)
    assert the_one(check_versions(CLUSTER, answers)).verdict == "ok"
    assert the_one(check_clocks(CLUSTER, answers)).verdict == "ok"


def test_where_no_node_answered_nothing_is_said_of_its_token(without_token):
    assert check_token(CLUSTER, all_say(answer=SILENT)) == []


@pytest.mark.parametrize(
    ("program", "other"), [("Ray", replace(HERE, ray="2.59.0")), ("Python", replace(HERE, python="3.10.4"))]
)
def test_another_ray_or_python_on_a_node_is_a_failure_that_names_both_versions(program, other):
    check = the_one(check_versions(CLUSTER, all_say(two=other)))
    assert check.verdict == "failed"
    assert check.what.startswith(f"{program} {'2.59.0' if program == 'Ray' else '3.10'} on two (10.0.0.5")
    assert "one" not in check.what
    assert program in check.mend


def test_pythons_that_differ_in_the_last_number_alone_do():
    major, minor, patch = HERE.python.split(".")
    other = replace(HERE, python=f"{major}.{minor}.{patch}9")
    assert the_one(check_versions(CLUSTER, all_say(two=other))).verdict == "ok"


def test_a_node_without_vaesearch_is_a_failure_that_names_it_and_what_to_install():
    check = the_one(check_package([ONE, TWO], all_say(one=replace(HERE, vaesearch=None))))
    assert check.verdict == "failed"
    assert check.what == "vaesearch is not installed on one (10.0.0.5, one00000)"
    assert f"install vaesearch {OURS}" in check.mend


def test_another_version_of_vaesearch_is_a_failure():
    check = the_one(check_package([ONE, TWO], all_say(two=replace(HERE, vaesearch="0.0.1"))))
    assert check.verdict == "failed"
    assert "vaesearch 0.0.1 on two" in check.what
    assert OURS in check.what


def test_a_node_on_which_no_trial_has_room_needs_no_vaesearch():
    assert the_one(check_package([ONE, TWO], all_say(head=replace(HERE, vaesearch=None)))).verdict == "ok"


def test_many_nodes_with_one_fault_are_one_line():
    nodes = tuple(a_node(f"n{number}") for number in range(9))
    runtime = Runtime("10.0.0.1:6379", nodes)
    check = the_one(check_package(nodes, all_say(runtime, replace(HERE, vaesearch=None))))
    assert check.what.count("(") == 4
    assert check.what.endswith("and 5 more")


OPEN = replace(HERE, asks_for_token=False)


@pytest.fixture
def without_token(tmp_path, monkeypatch) -> None:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_cluster_that_others_reach_and_that_asks_for_no_token_is_a_failure(without_token):
    check = the_one(check_token(CLUSTER, all_say(answer=OPEN)))
    assert check.verdict == "failed"
    assert "can run any program" in check.what
    assert "ray get-auth-token --generate" in check.mend


def test_one_open_node_is_enough_to_fail(without_token):
    check = the_one(check_token(CLUSTER, all_say(two=OPEN)))
    assert check.verdict == "failed"
    assert "two" in check.what


def test_who_has_switched_the_token_off_on_purpose_is_only_warned(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert the_one(check_token(CLUSTER, all_say(answer=OPEN))).verdict == "warning"


def test_a_cluster_on_loopback_without_a_token_is_a_warning(without_token):
    inside = Runtime("127.0.0.1:6379", tuple(replace(node, address="127.0.0.1") for node in CLUSTER.nodes))
    check = the_one(check_token(inside, all_say(inside, OPEN)))
    assert check.verdict == "warning"
    assert "every user of this machine" in check.what


def test_a_token_that_is_here_and_that_the_cluster_does_not_ask_for_is_a_warning(without_token, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text("a" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    is_open, unasked = check_token(CLUSTER, all_say(answer=OPEN))
    assert is_open.verdict == "failed"
    assert (unasked.name, unasked.verdict) == ("token", "warning")
    assert unasked.what == f"{file} has a token here, the cluster asks for none"
    assert "RAY_AUTH_MODE=token" in unasked.mend
    assert the_one(check_token(CLUSTER, all_say(two=OPEN))).verdict == "failed"  # the others ask for it


@pytest.mark.parametrize(("mode", "verdict"), [(0o600, "ok"), (0o400, "ok"), (0o640, "warning"), (0o604, "warning")])
def test_a_token_that_others_can_read_is_a_warning_with_the_command_that_mends_it(tmp_path, monkeypatch, mode, verdict):
    file = tmp_path / "token"
    file.write_text("a" * 64)
    file.chmod(mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    of_cluster, check = check_token(CLUSTER, all_say())
    assert of_cluster.verdict == "ok"
    assert check.verdict == verdict
    assert str(file) in check.what
    assert check.mend == ("" if verdict == "ok" else f"chmod 600 {file}")
    assert "a" * 64 not in check.what + check.mend


def test_a_token_that_is_named_and_not_there_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    _, check = check_token(CLUSTER, all_say())
    assert check.verdict == "failed"


def test_placement_tells_how_many_trials_have_room_and_where():
    check = the_one(check_placement(CLUSTER, Asked(cpus=3)))
    assert check.verdict == "ok"
    assert check.what.startswith("2 trials at once, each with 3 CPUs; room for 1 on one (")
    assert "1 on two (" in check.what
    assert "head" not in check.what


def test_placement_counts_no_more_than_was_asked_for():
    assert the_one(check_placement(CLUSTER, Asked(at_once=3))).what.startswith("3 trials at once")


def test_a_trial_that_fits_on_no_node_is_a_failure_with_what_would_do():
    check = the_one(check_placement(CLUSTER, Asked(cpus=5)))
    assert check.verdict == "failed"
    assert "5 CPUs" in check.what
    assert "resources.cpus_per_trial = 4" in check.mend


def test_trials_that_wait_for_a_cluster_to_grow_are_placeable():
    check = the_one(check_placement(Runtime("10.0.0.1:6379", (HEAD,)), Asked(at_once=8, is_growing=True)))
    assert check.verdict == "ok"
    assert check.what.startswith("8 trials at once")
    assert "room for 0 now" in check.what


def test_a_share_that_is_measured_later_is_placeable_where_there_is_a_gpu_and_where_there_is_none():
    with_gpus = Runtime("10.0.0.1:6379", (HEAD, a_node("gpu", gpus=2)))
    asked = Asked(gpus=None)
    assert the_one(check_placement(with_gpus, asked)).what.startswith("at least 2 trials at once")
    assert the_one(check_placement(CLUSTER, asked)).what.startswith("8 trials at once")


GPU = Runtime("10.0.0.1:6379", (ONE, a_node("gpu", gpus=2)))


def test_gpus_that_ray_and_torch_both_see_are_counted():
    check = the_one(check_gpus(GPU.nodes, all_say(GPU, gpu=replace(HERE, torch=CUDA)), are_asked_for=True))
    assert check.verdict == "ok"
    assert "2 GPUs" in check.what


@pytest.mark.parametrize(
    ("torch", "verdict", "words"),
    [
        (Torch("2.13.0+cpu", None, 0), "warning", "built for CPUs: trials would train on the CPU; install a torch"),
        (replace(CUDA, gpus=0), "failed", "sees none: trials would train on the CPU; see what `nvidia-smi`"),
        (replace(CUDA, gpus=1), "failed", "sees 1: trials would train on the CPU; see what `nvidia-smi`"),
        (replace(CUDA, gpus=4), "warning", "sees 4: some stand idle; start Ray there with --num-gpus=4"),
        (Torch(error="ImportError: libcudart.so.12"), "failed", "ImportError: libcudart.so.12"),
        (Torch(error="no answer within 15 s", is_late=True), "warning", "torch cannot say yet: no answer within 15 s"),
    ],
)
def test_gpus_on_which_ray_and_torch_do_not_agree_fail_only_where_trials_ask_for_what_is_not_there(
    torch, verdict, words
):
    answers = all_say(GPU, gpu=replace(HERE, torch=torch))
    check = the_one(check_gpus(GPU.nodes, answers, are_asked_for=True))
    assert check.verdict == verdict
    assert check.what.startswith("gpu (")
    assert "Ray sees 2 GPUs" in check.what
    assert words in f"{check.what}; {check.mend}"
    assert the_one(check_gpus(GPU.nodes, answers, are_asked_for=False)).verdict == "warning"


def test_gpus_of_a_node_that_gets_no_trial_are_not_looked_at():
    answers = all_say(GPU, gpu=replace(HERE, torch=Torch(error="No module named 'torch'")))
    assert the_one(check_gpus([ONE], answers, are_asked_for=True)).verdict == "ok"


def test_gpus_that_ray_does_not_offer_are_told():
    check = the_one(check_gpus([ONE, TWO], all_say(one=replace(HERE, torch=CUDA)), are_asked_for=False))
    assert check.verdict == "warning"
    assert "Ray sees 0 GPUs" in check.what
    assert "--num-gpus=2" in check.mend


def test_no_gpu_anywhere_is_no_fault():
    assert the_one(check_gpus([ONE, TWO], all_say(), are_asked_for=False)).verdict == "ok"


def test_data_that_an_object_store_cannot_hold_are_a_failure_with_the_size_that_would_do():
    tight = replace(TWO, object_store_bytes=80 * 2**20)
    check = the_one(check_memory([ONE, tight], all_say(), data_bytes=70 * 2**20))
    assert check.verdict == "failed"
    assert "70 MiB" in check.what
    assert "80 MiB on two" in check.what
    needed = int(check.mend.partition("--object-store-memory=")[2].split()[0])
    enough = replace(TWO, object_store_bytes=needed)
    assert the_one(check_memory([ONE, enough], all_say(), data_bytes=70 * 2**20)).verdict == "ok"


def test_shared_memory_smaller_than_the_object_store_is_a_warning():
    check = the_one(check_memory([ONE, TWO], all_say(one=replace(HERE, shm_bytes=64 * 2**20)), data_bytes=2**20))
    assert check.verdict == "warning"
    assert "/dev/shm has 64 MiB" in check.what
    assert "on one (" in check.what
    assert "--shm-size" in check.mend


def test_data_that_could_not_be_read_are_not_measured_against_memory():
    assert the_one(check_memory([ONE], all_say(), data_bytes=None)).verdict == "ok"


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "words"),
    [
        ((-0.9, 1.4), "ok", ""),
        ((-3.0, 1.0), "ok", ""),  # a slow trip proves nothing
        ((3.0, 5.0), "warning", "3 s ahead"),
        ((-9.0, -4.0), "warning", "4 s behind"),
        ((-99.0, -90.0), "warning", "90 s behind"),  # the driver's may be the wrong one
    ],
)
def test_clocks_are_judged_by_how_far_they_are_off_at_the_least_and_never_fail(ahead_s, verdict, words):
    check = the_one(check_clocks(CLUSTER, all_say(two=replace(HERE, clock_s=ahead_s))))
    assert check.verdict == verdict
    assert words in check.what
    if words:
        assert "two" in check.what


# ---- the probe


def test_the_probe_needs_nothing_of_ours_where_it_arrives():
    """As on a node without vaesearch: unpickled and run where no module of ours can be imported."""
    import ray.cloudpickle

    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('cluster', 'search', 'vae')))\n"  # None: an import of it fails
        "import json, pickle\n"
        "print(json.dumps(pickle.load(sys.stdin.buffer)(False)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=ray.cloudpickle.dumps(cluster.preflight._look()),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["python"] == platform.python_version()
    assert said["vaesearch"] == OURS
    assert abs(said["clock"] - time.time()) < 60


def test_nothing_is_wrong_with_the_ray_of_these_tests(ray_here):
    checks = check_nodes(ray_here, Asked(), data_bytes=2**20, patience_s=200)
    assert [check for check in checks if check.verdict == "failed"] == []
    assert {check.name for check in checks} >= {"nodes", "versions", "token", "placement", "gpus", "memory"}


def test_a_node_brings_its_versions_its_clock_and_its_memory(ray_here):
    (answer,) = ask_nodes(ray_here.nodes, patience_s=200).values()
    assert isinstance(answer, Answer)
    assert answer.ray == importlib.metadata.version("ray")
    assert answer.vaesearch == OURS
    assert answer.asks_for_token
    low, high = answer.clock_s
    assert low <= 0 <= high  # it is the same clock


def test_torch_is_asked_where_ray_has_gpus(ray_here, monkeypatch):
    monkeypatch.setattr(cluster.preflight, "TORCH_PATIENCE_S", 200.0)
    (node,) = ray_here.nodes
    (answer,) = ask_nodes([replace(node, num_gpus=1)], patience_s=300).values()
    assert isinstance(answer, Answer)
    assert answer.torch is not None
    assert answer.torch.version == importlib.metadata.version("torch")


def test_a_node_that_is_gone_is_told_and_not_waited_for(ray_here):
    (node,) = ray_here.nodes
    gone = replace(node, node_id="e" * len(node.node_id), host="gone")
    started = time.monotonic()
    answers = ask_nodes([node, gone], patience_s=100)
    assert time.monotonic() - started < 80
    assert isinstance(answers[node.node_id], Answer)
    silence = answers[gone.node_id]
    assert isinstance(silence, Silence)
    assert silence.reason
    assert not silence.is_broken


def test_a_node_on_which_the_probe_raises_is_told_from_one_that_is_silent(ray_here, monkeypatch):
    def broken(has_gpus: bool) -> None:
        raise TypeError("odd")

    monkeypatch.setattr(cluster.preflight, "_look", lambda: broken)
    (silence,) = ask_nodes(ray_here.nodes, patience_s=200).values()
    assert isinstance(silence, Silence)
    assert silence.is_broken
    assert "odd" in silence.reason


def test_a_clock_that_a_slow_first_trip_leaves_open_is_read_again(ray_here, monkeypatch):
    monkeypatch.setattr(cluster.preflight, "CLOCK_WARNING_S", 0.0)
    (answer,) = ask_nodes(ray_here.nodes, patience_s=200).values()
    assert isinstance(answer, Answer)
    low, high = answer.clock_s
    assert low <= 0 <= high
    assert high - low < 5


def test_a_node_whose_cores_are_all_taken_answers(ray_here):
    import ray

    class Busy:
        def is_there(self) -> bool:
            return True

    busy = [ray.remote(num_cpus=1)(Busy).remote() for _ in range(int(ray_here.num_cpus))]
    try:
        assert all(ray.get([actor.is_there.remote() for actor in busy]))
        (answer,) = ask_nodes(ray_here.nodes, patience_s=200).values()
        assert isinstance(answer, Answer)
    finally:
        for actor in busy:
            ray.kill(actor)


# ---- several nodes

NODES = """
import json, os, signal, subprocess, sys, time
from dataclasses import asdict, replace
from ray.cluster_utils import Cluster
from cluster.preflight import Asked, ask_nodes, check_nodes
from cluster.runtime import living_nodes, ray_runtime

bare, data_bytes, patience_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
cluster = Cluster()
cluster.add_node(num_cpus=0, object_store_memory=200_000_000, include_dashboard=False)
tight = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
gpus = cluster.add_node(num_cpus=1, num_gpus=2, object_store_memory=200_000_000)
stopped = cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
subprocess.Popen(
    [bare, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.address}", "--num-cpus=1",
     "--object-store-memory=200000000"], stdout=subprocess.DEVNULL,
)
said = {"nodes": {name: node.node_id for name, node in
        {"head": cluster.head_node, "tight": tight, "gpus": gpus, "stopped": stopped}.items()}}
raylet = stopped.all_processes["raylet"][0].process.pid
with ray_runtime(cluster.address) as runtime:
    while len(nodes := living_nodes()) < 5:
        time.sleep(0.1)
    ask_nodes(nodes, 400)  # what is slow, the first worker of each and torch from the disk, is not to count
    os.kill(raylet, signal.SIGSTOP)
    try:
        started = time.monotonic()
        runtime = replace(runtime, nodes=nodes)
        checks = check_nodes(runtime, Asked(), data_bytes=data_bytes, patience_s=patience_s)
        said |= {"checks": [asdict(check) for check in checks], "took_s": time.monotonic() - started}
    finally:
        os.kill(raylet, signal.SIGCONT)
    print(json.dumps(said | {"all": [node.node_id for node in nodes]}), flush=True)
    time.sleep(600)  # to be ended from outside, with all nodes: Ray takes its time for each
"""


def bare_python(folder: Path) -> Path:
    """A Python that has all that this one has, but nothing of this project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "vaesearch" not in path.name and path.name not in ("cluster", "search", "vae"):
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.mark.system
@pytest.mark.timeout(900)
def test_on_a_cluster_each_node_is_named_for_what_is_wrong_with_it(tmp_path):
    patience_s = 15.0
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    bare = bare_python(tmp_path / "bare")
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", NODES, bare, str(70 * 2**20), str(patience_s)],
            cwd=tmp_path,  # not that of this project: the driver's is where workers look for modules
            env=clean_environment() | token,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        said = next((json.loads(line) for line in process.stdout if line.startswith(b"{")), None)
    finally:
        end_family(process)
        process.stdout.close()
    assert said is not None, (tmp_path / "stderr").read_text()[-3000:]
    (without,) = set(said["all"]) - set(said["nodes"].values())
    short = {name: node_id[:8] for name, node_id in (said["nodes"] | {"without": without}).items()}
    assert said["took_s"] < patience_s + 60  # Ray (2.60) itself waits for minutes
    checks = [Check(**check) for check in said["checks"]]
    found = {(check.name, check.verdict): check for check in checks if check.verdict != "ok"}
    assert len(found) == len([check for check in checks if check.verdict != "ok"])
    wrong = {key: [node for node, mark in short.items() if mark in check.what] for key, check in found.items()}
    assert wrong == {
        ("nodes", "warning"): ["stopped"],
        ("versions", "failed"): ["without"],
        ("memory", "failed"): ["tight"],
        ("gpus", "warning"): ["gpus"],
    }
    assert "vaesearch is not installed" in found["versions", "failed"].what
