"""The one secret that opens a Ray cluster: where it is found. Its value stands in no text made here."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

VALUE_VARIABLE, PATH_VARIABLE, MODE_VARIABLE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
DEFAULT_PATH = "~/.ray/auth_token"
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class TokenUnreadable(ValueError):
    """A token was named and cannot be had. The text says where and what would do."""


@dataclass(frozen=True)
class Token:
    """origin: the variable that holds it, or the file's path."""

    value: str = field(repr=False)
    origin: str
    path: Path | None


def find_token() -> Token | None:
    """The token that Ray (2.60) would find, in its order; None where there is none or it is switched off.

    Raises TokenUnreadable.
    """
    if os.environ.get(MODE_VARIABLE, "").strip().lower() == "disabled":
        return None
    if value := os.environ.get(VALUE_VARIABLE, "").strip():
        return Token(value, VALUE_VARIABLE, None)
    if named := os.environ.get(PATH_VARIABLE):
        return _read(Path(named), f"{PATH_VARIABLE}={named}")  # as it stands: Ray knows no ~ there
    default = os.path.expanduser(DEFAULT_PATH)  # which, unlike Path's, does without a home
    return _read(Path(default), default) if os.path.exists(default) else None


def not_private(token: Token) -> str | None:
    """What is wrong with the mode of the token's file, or None."""
    if token.path is None:
        return None
    mode = stat.S_IMODE(token.path.stat().st_mode)
    if not mode & OTHERS:
        return None
    return f"{token.path} has mode {mode:04o}: others on this machine may read the token"


def _read(path: Path, named: str) -> Token:
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise TokenUnreadable(f"{named}: the token cannot be read: {reason}; {_mend(path)}") from None
    if not value:
        raise TokenUnreadable(f"{named}: the token's file is empty; {_mend(path)}")
    if not value.isascii() or not value.isprintable():
        raise TokenUnreadable(f"{named}: that is no token: it has more than one line or odd characters; {_mend(path)}")
    return Token(value, str(path), path)


def _mend(path: Path) -> str:
    return f"put the cluster's token there, with mode 0600, or set {PATH_VARIABLE} to its file"
