"""The study file as text: read from TOML or YAML, written with comments, its errors explained."""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from search.storage import Location
from vae.config import InputError

MAX_ERRORS_SHOWN = 3
FLAGS = {
    "name": "--name",
    "seed": "--seed",
    "goal": "--goal",
    "storage.path": "--storage",
    "data.source": "--data",
    "data.data_dir": "--data-dir",
    "budget.trials": "--trials",
    "budget.max_epochs": "--max-epochs",
    "resources.cpus_per_trial": "--cpus-per-trial",
    "resources.gpus_per_trial": "--gpus-per-trial",
    "resources.concurrency": "--concurrency",
}
"""Keys with a flag of their own; the others are reached by `--set`."""
MOVED = ("model.avg_pool_window", "model.activation_dropout")
"""Keys that were in another section in an earlier version."""
FOLLOWING = ("name", "binarize", "kl_warmup_epochs", "grace_epochs")
"""Keys whose defaults follow others: a study file to start from leaves them commented out."""


class Kind(NamedTuple):
    """Of data, and the keys that it asks for."""

    description: str
    values: dict[str, dict[str, Any]]


KINDS = {
    "images": Kind(
        "images, black and white, or grey and drawn anew as such in each step",
        {"data": {"source": "images.npz"}, "model": {"body": "conv", "likelihood": "bernoulli"}},
    ),
    "grey-images": Kind(
        "images whose shades or colours count as they are",
        {"data": {"source": "images.npz"}, "model": {"body": "conv", "likelihood": "continuous_bernoulli"}},
    ),
    "tables": Kind(
        "tables of measurements, whose columns are standardised",
        {"data": {"source": "table.csv"}, "model": {"likelihood": "gaussian"}},
    ),
    "counts": Kind(
        "tables of counts, with a size factor for each row",
        {"data": {"source": "counts.csv"}, "model": {"likelihood": "negative_binomial"}},
    ),
}
"""What `init --for` writes study files for."""


def read_study_file(path: Location) -> dict[str, Any]:
    """The keys of a TOML or YAML file. `[provenance]`, which a stored study.toml carries, is left out."""
    is_yaml = path.name.lower().endswith((".yaml", ".yml"))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `vaesearch init > {path}` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        if is_yaml:
            import yaml

            values = yaml.safe_load(text) or {}
        else:
            values = tomllib.loads(text)
    except Exception as error:  # yaml and tomllib raise unrelated types
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not valid {'YAML' if is_yaml else 'TOML'}: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, got a {type(values).__name__}")
    values.pop("provenance", None)
    return values


def parse_value(text: str) -> object:
    """The value of `--set key=value`: read as TOML, else taken as text."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def set_dotted(values: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"{dotted}: {parent} is a value, not a section")
    values[last] = value


def commented_study_file(spec: BaseModel, purpose: str | None = None) -> str:
    """A study file with every key of `spec` at its value, each with its unit and choices. purpose: as of a `Kind`."""
    lines = ["# A study for `vaesearch run THIS_FILE`. Every key is at its default; delete what you do not need."]
    if purpose is not None:
        lines = [f"# For {purpose}.", "# A study for `vaesearch run THIS_FILE`; delete what you do not need."]
    lines += _commented_keys(spec, skip_sections=True)
    for section_name, section in spec:
        if isinstance(section, BaseModel):
            lines += ["", f"[{section_name}]"]
            if section_name == "space":
                lines.append("# A value fixes a parameter, a list enumerates it, {low, high, log} ranges over it.")
            lines += _commented_keys(section)
    return "\n".join(lines) + "\n"


def _commented_keys(section: BaseModel, skip_sections: bool = False) -> Iterator[str]:
    for key, field in type(section).model_fields.items():
        if skip_sections and isinstance(getattr(section, key), BaseModel):
            continue
        value = section.model_dump(mode="json")[key]
        line = f"# {key} =" if value is None else f"{key} = {_toml_inline(value)}"
        if key in FOLLOWING:
            line = f"# {line}"
        yield f"{line}  # {field.description}" if len(line) < 60 else f"# {field.description}\n{line}"


def _toml_inline(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_inline, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml_inline(v)}" for k, v in value.items()) + "}"
    return repr(value)


def explain(
    error: ValidationError, root: type[BaseModel], where: str, overrides: Mapping[str, object]
) -> Iterator[str]:
    """One line an error: where (the file, or the flag that gave it), what, and what would do."""
    errors = error.errors(include_url=False)
    for detail in errors[:MAX_ERRORS_SHOWN]:
        path = [str(part) for part in detail["loc"]]
        key = ".".join(path)
        given = next((k for k in overrides if f"{k}.".startswith(f"{key}.") or f"{key}.".startswith(f"{k}.")), None)
        prefix = f"{where}: {key}" if key else where
        if key and given is not None:
            prefix = f"{FLAGS[given]}: {given}" if given in FLAGS else f"--set {given}"
        if detail["type"] == "extra_forbidden" and key in MOVED:
            yield f"{prefix}: is space.{path[-1]} now"
            continue
        if detail["type"] == "extra_forbidden":
            yield f"{prefix}: unknown key; {_nearest_key(path, root)}"
            continue
        if detail["type"] == "model_type":
            yield f"{prefix}: is a section; give its keys, not {detail['input']!r}"
            continue
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        shown = detail.get("input")
        tells_value = detail["type"] == "value_error" or not isinstance(shown, str | int | float | bool)
        yield f"{prefix}: {message}" if tells_value else f"{prefix} = {shown!r} {message}"
    if len(errors) > MAX_ERRORS_SHOWN:
        yield f"... and {len(errors) - MAX_ERRORS_SHOWN} more"


def _nearest_key(path: list[str], root: type[BaseModel]) -> str:
    section: type[BaseModel] | None = root
    for part in path[:-1]:
        field = section.model_fields.get(part) if section else None
        section = type(field.default) if field and isinstance(field.default, BaseModel) else None
    known = list(section.model_fields) if section else []
    scores = {k: difflib.SequenceMatcher(None, path[-1], k).ratio() for k in known}
    parts = {k: max(difflib.SequenceMatcher(None, w, k).ratio() for w in path[-1].split("_")) for k in known}
    near = max(known, key=lambda k: max(scores[k], parts[k]), default=None)
    if near is not None and max(scores[near], parts[near]) >= 0.6:
        return f"did you mean {near}?"
    return f"known here: {', '.join(known)}"
