"""The token of a cluster: found where Ray finds it, and in no text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.tokens import TokenUnreadable, find_token, not_private

SECRET = "0123456789abcdef"
RAYS_OWN = """
import json, sys
from ray._raylet import AuthenticationTokenLoader
print(json.dumps(AuthenticationTokenLoader.instance().get_token_for_http_header()))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, in which no variable names a token."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(path: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_without_a_token_there_is_none(home):
    assert find_token() is None


@pytest.mark.parametrize("places", [("value", "file", "home"), ("file", "home"), ("home",)])
def test_the_first_place_is_that_of_ray_itself(home, monkeypatch, places):
    write(home / ".ray" / "auth_token", " of-home\n")
    if "file" in places:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(write(home / "named", "of-file\n\n")))
    if "value" in places:
        monkeypatch.setenv("RAY_AUTH_TOKEN", " of-value ")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    rays = subprocess.run([sys.executable, "-c", RAYS_OWN], check=True, capture_output=True, text=True)
    token = find_token()
    assert token is not None
    assert json.loads(rays.stdout) == {"authorization": f"Bearer {token.value}"}
    assert token.value == f"of-{places[0]}"
    assert (token.path is None) == (places[0] == "value")


def test_an_empty_variable_is_none_as_with_ray(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    assert find_token() is None


def test_where_authentication_is_disabled_a_token_is_not_used(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    monkeypatch.setenv("RAY_AUTH_MODE", "Disabled")
    assert find_token() is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b" \n", "empty"), (b"\xff\xfe\x00", "no text"), (b"two\nlines", "no token")],
)
def test_a_named_file_without_a_token_is_an_error_that_says_what_would_do(home, monkeypatch, content, reason):
    file = home / "named"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(TokenUnreadable, match=f"{file}.*{reason}.*0600"):
        find_token()


def test_the_value_is_in_no_text_of_the_token(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(write(home / "named", mode=0o644)))
    token = find_token()
    assert token is not None
    assert SECRET not in f"{token} {token!r} {not_private(token)}"
    assert str(home / "named") in str(token)


@pytest.mark.parametrize(("mode", "is_private"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False)])
def test_a_file_that_others_may_read_is_told(home, mode, is_private):
    write(home / ".ray" / "auth_token", mode=mode)
    token = find_token()
    assert token is not None
    wrong = not_private(token)
    assert (wrong is None) == is_private
    if wrong is not None:
        assert f"{mode:04o}" in wrong


def test_a_variable_has_no_mode(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    token = find_token()
    assert token is not None
    assert not_private(token) is None
