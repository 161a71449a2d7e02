"""Jobs over HTTP: which addresses are taken, where the token goes and where it does not, what is sent."""

import contextlib
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import free_ports

import cluster.jobs
from cluster.head import ClusterUnreachable
from cluster.jobs import AccessDenied, AddressRefused, Job, JobExists, Jobs, UploadTooLarge, VersionMismatch, own_output

SECRET = "0123456789abcdef"
HTML = ("text/html", b"<p>hello</p>")


class Server(http.server.ThreadingHTTPServer):
    """Answers all requests alike, and keeps the headers of each."""

    def __init__(self, status: int, content: tuple[str, bytes], headers: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.content, self.headers = status, content, headers
        self.seen: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.seen.append((self.path, dict(self.headers.items())))
        kind, content = self.server.content
        self.send_response(self.server.status)
        for name, value in {**self.server.headers, "Content-Type": kind, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def do_DELETE(self) -> None:
        """As Ray does where a job has not ended."""
        self.send_error(500)

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def serving(status: int = 200, content: tuple[str, bytes] = HTML, **headers: str) -> Iterator[Server]:
    with Server(status, content, headers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    return SECRET


# ---- addresses


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "http://localhost:8265/", "http://[::1]:8265", "https://ray.example.org"]
)
def test_loopback_and_encrypted_addresses_are_taken(address):
    assert Jobs(address).address == address.rstrip("/")


@pytest.mark.parametrize("address", ["http://10.0.0.5:8265", "http://head:8265", "http://localhost.example.org"])
def test_plain_http_beyond_loopback_is_refused_unless_it_is_meant(address):
    with pytest.raises(AddressRefused, match=r"ssh -N -L 8265:127\.0\.0\.1"):
        Jobs(address)
    assert Jobs(address, insecure=True).address == address


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1:6379", "auto", "head:8265", "http://", ""])
def test_another_kind_of_address_says_which_one_is_wanted(address):
    with pytest.raises(AddressRefused, match=r"such as http://127\.0\.0\.1:8265"):
        Jobs(address)


@pytest.mark.parametrize("address", ["http://me:s3cret@127.0.0.1:8265", "https://127.0.0.1:8265?token=s3cret"])
def test_secrets_do_not_belong_in_an_address_and_are_not_repeated(address):
    with pytest.raises(AddressRefused) as refused:
        Jobs(address)
    assert "s3cret" not in str(refused.value)


def test_the_variables_of_rays_own_client_do_not_override_the_address(monkeypatch):
    with serving(content=("application/json", b"[]")) as meant, serving() as other:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            monkeypatch.setenv(name, other.url)
        assert Jobs(meant.url).list() == []
        assert not other.seen


# ---- the token


def test_the_token_is_a_header_and_nothing_else_of_netrc_or_a_proxy(tmp_path, monkeypatch):
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with serving(content=("application/json", b"[]")) as meant, serving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        Jobs(meant.url).list()
        assert [(path, headers["Authorization"]) for path, headers in meant.seen] == [
            ("/api/jobs/", f"Bearer {SECRET}")
        ]
        assert not proxy.seen


def test_without_a_token_there_is_no_such_header(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with serving(content=("application/json", b"[]")) as server:
        Jobs(server.url).list()
        assert "Authorization" not in server.seen[0][1]


def test_a_redirection_is_not_followed():
    with serving() as other, serving(302, Location=other.url) as first:
        with pytest.raises(ClusterUnreachable, match="302"):
            Jobs(first.url).list()
        assert not other.seen


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_named_by_its_origin_never_by_its_value(status):
    with serving(status) as server, pytest.raises(AccessDenied, match="RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN_PATH") as no:
        Jobs(server.url).list()
    assert SECRET not in str(no.value)


def test_a_missing_token_is_told(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with serving(401) as server, pytest.raises(AccessDenied, match="there is none here"):
        Jobs(server.url).list()


# ---- what answers, and what does not


def test_where_nothing_listens_the_tunnel_is_named():
    (port,) = free_ports(1)
    with pytest.raises(ClusterUnreachable, match=f"nothing listens there\n.*ssh -N -L {port}:127.0.0.1:8265"):
        Jobs(f"http://127.0.0.1:{port}").list()


def test_a_page_is_no_cluster():
    with serving() as server, pytest.raises(ClusterUnreachable, match="no Ray dashboard"):
        Jobs(server.url).list()


def test_an_error_of_the_server_is_told_by_its_last_line():
    with serving(500, ("text/plain", b"Traceback\n  ...\nKeyError: 'head'\n")) as server:
        with pytest.raises(ClusterUnreachable, match=r"500: KeyError: 'head'$"):
            Jobs(server.url).list()


@pytest.mark.parametrize(("theirs", "fits"), [("2.60.3", True), ("2.59.0", False), ("3.60.0", False)])
def test_major_and_minor_version_of_ray_must_be_ours(monkeypatch, theirs, fits):
    monkeypatch.setattr(cluster.jobs, "version", lambda name: "2.60.0")
    with serving(content=("application/json", f'{{"ray_version": "{theirs}"}}'.encode())) as server:
        with contextlib.nullcontext() if fits else pytest.raises(VersionMismatch, match=theirs):
            Jobs(server.url).check_version()


@pytest.mark.parametrize(
    ("state", "refused", "said"),
    [("RUNNING", JobExists, "study is RUNNING"), ("FAILED", ClusterUnreachable, "HTTP status 500")],
)
def test_a_job_that_is_at_work_is_told_from_a_server_that_fails(state, refused, said):
    job = {"submission_id": "study", "status": state, "entrypoint": ""}
    with serving(content=("application/json", json.dumps(job).encode())) as server:
        with pytest.raises(refused, match=said):
            Jobs(server.url).delete("study")


# ---- what is sent and said


def package(folder: Path, target: Path) -> str:
    with target.open("wb+") as file:
        return cluster.jobs._zip(folder, file)


def test_a_package_has_all_files_and_the_same_ones_make_the_same_name(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "study.toml").write_text("seed = 1")
        (tmp_path / name / "data" / "x.npy").write_bytes(b"123")
    names = [package(tmp_path / name, tmp_path / f"{name}.zip") for name in ("one", "two")]
    assert names[0] == names[1]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "data/x.npy": b"123",
            "study.toml": b"seed = 1",
        }
    (tmp_path / "two" / "data" / "x.npy").write_bytes(b"124")
    assert package(tmp_path / "two", tmp_path / "two.zip") != names[0]


def test_what_the_dashboard_would_not_take_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.jobs, "UPLOAD_LIMIT_BYTES", 100)
    (tmp_path / "x.npy").write_bytes(bytes(range(200)))
    with serving() as server:
        with pytest.raises(UploadTooLarge):
            Jobs(server.url).submit("study", "true", working_dir=tmp_path)
        assert not server.seen


HEADER = "Running entrypoint for job study: echo vaesearch-job-2; exec vaesearch\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ""),
        ("INFO Runtime env is setting up.\n", ""),
        (f"INFO\n{HEADER}vaesearch-job-2\na\nb\n", "a\nb\n"),
        (f"INFO\nvaesearch-job-2\na\n{HEADER}b\n", "a\nb\n"),  # Ray flushes its own line late
        (f"INFO\nvaesearch-job-1\nformer\nINFO\n{HEADER}vaesearch-job-2\n", ""),
        ("INFO\nvaesearch-job-1\nformer\nINFO\n", ""),
    ],
)
def test_what_a_job_said_is_told_from_rays_lines_and_from_those_of_its_namesakes(text, said):
    job = Job("study", "RUNNING", "echo vaesearch-job-2; exec vaesearch", {}, "", None, None, None)
    assert own_output(job, text) == said
