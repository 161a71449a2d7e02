"""What launches a cluster is valid, agrees on versions with pyproject.toml, and is closed by default."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "cluster" / "deploy"
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = DEPLOY / "Dockerfile"
RAY_UP = ("aws.yaml", "on-premises.yaml")
KUBERAY = ("raycluster.yaml", "rayjob.yaml")
ALL = (COMPOSE, DOCKERFILE, *(DEPLOY / name for name in (*RAY_UP, *KUBERAY, "make-token")))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return load(COMPOSE)["services"]


def dependencies() -> dict[str, str]:
    """Of pyproject.toml: what is said of each package's version."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {found[1]: found[2] for text in stated if (found := re.match(r"([\w-]+)(?:\[.*\])?(.*)", text))}


# --- versions


def test_rays_minor_version_stands_in_pyproject_and_all_else_agrees():
    pinned = re.fullmatch(r">=(\d+)\.(\d+),<\1\.(\d+)", dependencies()["ray"])
    assert pinned
    assert int(pinned[3]) == int(pinned[2]) + 1, "one minor version"
    minor = f"{pinned[1]}.{pinned[2]}"
    assert version("ray").startswith(f"{minor}.")
    stated = [text for path in (*ALL, ROOT / "docs" / "clusters.md") for text in versions_of_ray(path.read_text())]
    assert len(stated) >= len(ALL)
    assert {".".join(text.split(".")[:2]) for text in stated} == {minor}
    assert "ray" not in re.findall(r"pip install .*", DOCKERFILE.read_text()), "it comes from pyproject.toml"


def versions_of_ray(text: str) -> list[str]:
    return [found[1] or found[2] for found in re.finditer(r'vaesearch:ray-([\d.]+\d)|rayVersion: "([\d.]+)"', text)]


def test_pythons_minor_version_stands_in_the_dockerfile_alone():
    base = re.search(r"^ARG BASE=python:(\d+\.\d+)-slim$", DOCKERFILE.read_text(), re.MULTILINE)
    assert base
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == f">={base[1]}"
    assert project["tool"]["mypy"]["python_version"] == base[1]
    assert not [path for path in ALL if path != DOCKERFILE and re.search(r"python:?3\.\d", path.read_text())]


def test_torch_is_installed_once_first_and_within_what_pyproject_allows():
    text = DOCKERFILE.read_text()
    pinned = re.search(r"^ARG TORCH=torch==([\d.]+)$", text, re.MULTILINE)
    assert pinned
    low, high = re.findall(r"[\d.]+", dependencies()["torch"])
    assert key(low) <= key(pinned[1]) < key(high)
    assert f"torch=={pinned[1]}" in (ROOT / ".ci" / "run").read_text(), "what is tested is what is shipped"
    steps = ['"${TORCH}"', "COPY pyproject.toml", "requirements.txt ${EXTRA_PACKAGES}", "COPY . ", "--no-deps"]
    places = [text.index(step) for step in steps]
    assert places == sorted(places), "what changes often comes late"


def key(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


# --- the image


def test_the_image_is_sent_what_it_needs_and_no_secret_and_no_study():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"])
    assert allowed == packages | {"pyproject.toml", "README.md", "LICENSE"}
    assert "cluster/deploy" in lines[lines.index("!cluster") :]


def test_the_image_runs_as_a_user_who_is_not_root_with_token_authentication():
    text = DOCKERFILE.read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "${UID}"
    assert "ARG UID=1000" in text
    assert "RAY_AUTH_MODE=token" in text


# --- compose


def test_compose_publishes_the_dashboard_on_loopback_and_nothing_else(services):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"head": ["127.0.0.1:${VAESEARCH_PORT:-8265}:8265"]}
    assert not [name for name, service in services.items() if "network_mode" in service or "expose" in service]
    assert {tuple(service["networks"]) for service in services.values()} == {("cluster",)}


def test_every_container_has_no_capabilities_restarts_and_is_looked_after(services):
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["init"] is True, name
        assert service["healthcheck"]["test"][0] == "CMD-SHELL", name
        assert "python" not in service["healthcheck"]["test"][1], "what is run every few seconds costs next to nothing"


def test_the_token_is_a_secret_without_default_of_containers_that_are_not_roots(services):
    document = load(COMPOSE)
    assert document["secrets"]["ray_token"]["file"].startswith("${VAESEARCH_TOKEN_FILE:?")
    for name in ("head", "worker", "worker-gpu"):
        assert services[name]["secrets"] == ["ray_token"]
        assert services[name]["user"] == "${VAESEARCH_UID:-1000}"
        environment = services[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "s3" not in {name for name, service in services.items() if "ray_token" in service.get("secrets", [])}


def test_no_trial_runs_on_the_head_and_a_lost_worker_is_soon_noticed(services):
    head = " ".join(services["head"]["command"])
    assert "--num-cpus=0 --num-gpus=0" in head
    assert services["head"]["environment"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    for name in ("head", "worker", "worker-gpu"):
        environment = services[name]["environment"]
        silent_ms = int(environment["RAY_health_check_failure_threshold"]) * (
            int(environment["RAY_health_check_period_ms"]) + int(environment["RAY_health_check_timeout_ms"])
        )
        assert silent_ms <= 15_000
        assert int(environment["RAY_grpc_client_keepalive_time_ms"]) <= 5000


def test_rays_names_for_these_settings_are_those_of_the_installed_version(services):
    import ray

    words = (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").read_bytes()
    for name in services["worker"]["environment"]:
        if name.startswith(("RAY_health", "RAY_grpc")):
            assert name.removeprefix("RAY_").encode() in words, f"Ray knows no {name}"


def test_gpus_and_an_object_store_are_there_when_asked_for(services):
    assert {name: service["profiles"] for name, service in services.items() if "profiles" in service} == {
        "worker-gpu": ["gpu"],
        "s3": ["s3"],
    }
    [device] = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "minio" not in COMPOSE.read_text()
    assert not re.search(r"(ACCESS_KEY|SECRET)\w*[:=]\s*\S", COMPOSE.read_text()), "no default keys"


def test_the_token_is_made_once_private_and_found_by_compose(tmp_path):
    script = tmp_path / "cluster" / "deploy" / "make-token"
    token = tmp_path / "cluster" / "deploy" / "secrets" / "ray_token"
    token.parent.mkdir(parents=True)
    shutil.copy(DEPLOY / "make-token", script)
    (tmp_path / ".env").write_text("VAESEARCH_WORKERS=3\n")
    said = [subprocess.run([script], capture_output=True, text=True, check=True, cwd="/").stdout for _ in range(2)]
    value = token.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}\n", value)
    assert value.strip() not in "".join(said)
    assert f"export RAY_AUTH_TOKEN_PATH={token}" in said[0]
    assert token.stat().st_mode & 0o777 == 0o600
    uid = os.getuid() or 1000
    assert token.stat().st_uid == uid
    assert (tmp_path / ".env").read_text().splitlines() == [
        "VAESEARCH_WORKERS=3",
        "VAESEARCH_TOKEN_FILE=./cluster/deploy/secrets/ray_token",
        f"VAESEARCH_UID={uid}",
    ]


def test_git_keeps_no_secret():
    secrets = DEPLOY / "secrets" / ".gitignore"
    assert [line for line in secrets.read_text().splitlines() if not line.startswith("#")] == ["*", "!.gitignore"]


# --- ray up


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_the_file(name):
    """By Ray's own schema and its own rules, which fill in what is missing."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(DEPLOY / name))
    validate_config(config)
    assert config["setup_commands"] == config["head_setup_commands"] == [], "Ray's defaults install another Ray"
    assert config["idle_timeout_minutes"] <= 10
    assert {where: Path(what) for where, what in config["file_mounts"].items()} == {
        "~/.ray/auth_token": Path("~/.ray/auth_token")
    }
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in commands[-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(config["docker"]["run_options"])


def test_on_aws_no_port_is_opened_and_workers_come_and_go():
    types = load(DEPLOY / "aws.yaml")["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    for name, node in types.items():
        assert node["node_config"]["SecurityGroupIds"], f"{name}: Ray's own group lets the whole internet try SSH"
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        if name != "head":
            assert node["min_workers"] == 0
            assert "IamInstanceProfile" not in node["node_config"], "a worker needs no rights"
            assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


# --- KubeRay

# What a cluster must have, by the names of the RayCluster of ray.io/v1; None: any value.
CLUSTER_FIELDS = {
    "rayVersion": None,
    "authOptions.mode": "token",
    "headGroupSpec.serviceType": "ClusterIP",
    "headGroupSpec.rayStartParams.num-cpus": "0",
    "headGroupSpec.rayStartParams.num-gpus": "0",
    "headGroupSpec.template.spec.containers": None,
    "workerGroupSpecs": None,
}
GROUP_FIELDS = ("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
JOB_FIELDS = {
    "entrypoint": None,
    "submissionMode": "K8sJobMode",
    "shutdownAfterJobFinishes": True,
    "ttlSecondsAfterFinished": None,
    "activeDeadlineSeconds": None,
    "backoffLimit": None,
    "rayClusterSpec": None,
}


def documents(name: str) -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / name).read_text())}


def cluster_spec(name: str) -> dict:
    found = documents(name)
    return found["RayCluster"]["spec"] if "RayCluster" in found else found["RayJob"]["spec"]["rayClusterSpec"]


def pods(name: str) -> Iterator[dict]:
    spec = cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]


def at(document: dict, path: str) -> Any:
    for name in path.split("."):
        document = document[name]
    return document


@pytest.mark.parametrize("name", KUBERAY)
def test_a_manifest_has_what_kuberay_needs(name):
    for document in documents(name).values():
        assert {"apiVersion", "kind", "metadata"} <= document.keys()
        assert document["metadata"]["name"]
    assert {found["apiVersion"] for kind, found in documents(name).items() if kind.startswith("Ray")} == {"ray.io/v1"}
    spec = cluster_spec(name)
    for path, value in CLUSTER_FIELDS.items():
        assert at(spec, path) == value or value is None, path
    for group in spec["workerGroupSpecs"]:
        assert set(GROUP_FIELDS) <= group.keys()
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    claims = [volume["persistentVolumeClaim"]["claimName"] for pod in pods(name) for volume in pod["spec"]["volumes"]
              if "persistentVolumeClaim" in volume]  # fmt: skip
    assert claims == [documents(name)["PersistentVolumeClaim"]["metadata"]["name"]], "the head alone writes"


def test_the_job_is_one_that_goes_on_when_it_is_started_again():
    job = documents("rayjob.yaml")["RayJob"]["spec"]
    for path, value in JOB_FIELDS.items():
        assert at(job, path) == value or value is None, path
    assert job["backoffLimit"] > 0
    program, command, *arguments = job["entrypoint"].split()
    assert (program, command) == ("vaesearch", "supervise")
    context = command_of_ours(command).make_context(command, arguments)
    mounts = {mount["mountPath"] for mount in next(pods("rayjob.yaml"))["spec"]["containers"][0]["volumeMounts"]}
    assert str(context.params["study_file"].parent) in mounts
    assert context.params["storage"] in mounts, "the ledger is on the volume that outlives the cluster"


def command_of_ours(name: str) -> Any:
    from search.cli import app

    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def test_the_study_of_the_job_is_a_study():
    from search.spec import StudySpec

    text = documents("rayjob.yaml")["ConfigMap"]["data"]["study.toml"]
    assert StudySpec.model_validate(tomllib.loads(text)).name == "digits"


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_no_root_no_capabilities_and_bounds(name):
    for pod in pods(name):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), "KubeRay's own need wget"


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_takes_the_pods_and_all_that_is_not_rays(name):
    checker = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for kind, document in documents(name).items():
        if not kind.startswith("Ray"):
            checker.validate(document, checker.latest_version(), strict=True)
    for pod in pods(name):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **pod["metadata"]}, "spec": pod["spec"]}
        checker.validate(whole, checker.latest_version(), strict=True)


# --- all of them


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_nothing_is_open_to_the_world_or_floats(path):
    text = path.read_text()
    assert not re.search(r"RAY_AUTH_MODE\W+disabled|RAY_AUTH_TOKEN=|NodePort|LoadBalancer|privileged: true", text)
    for image in re.findall(r"^\s*(?:- )?image: (?:&\w+ )?([^*\s]\S*)", text, re.MULTILINE):
        assert re.search(r":[\w.-]*\d", image), f"{image} has no version"
