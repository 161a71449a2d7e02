"""What the commands of the shell share: their options, and how they speak. Answers go to stdout, the rest to stderr."""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from search.layout import DEFAULT_STORAGE, study_folders
from vae.config import ActivationName, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from search.spec import StudySpec
    from search.storage import Location


ANEW = "nothing was written; the same command begins anew"
"""What Ctrl-C leaves of a command that writes at its end."""


def complete_study(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell: the studies that begin so. None behind a URL, which would take a while to answer."""
    storage = context.params.get("storage") or DEFAULT_STORAGE
    if "://" in storage:
        return []
    names = (folder.name for folder in study_folders(Path(storage).expanduser()))
    return [name for name in names if name.startswith(incomplete)]


def complete_activation(incomplete: str) -> list[str]:
    return [name for name in get_args(ActivationName) if name.startswith(incomplete)]


Storage = Annotated[str, typer.Option(help="Folder or URL of the studies.", envvar="VAESEARCH_STORAGE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="Name of the study.", autocompletion=complete_study)]
MovedData = Annotated[str | None, typer.Option("--data", help="The data, if they have moved.")]
MovedDir = Annotated[str | None, typer.Option("--data-dir", help="Folder with the idx files, if it has moved.")]
StudyFile = Annotated[Path | None, typer.Argument(help="A study file, TOML or YAML; none: the defaults.")]
NewName = Annotated[str | None, typer.Option("--name", help="Name of the study.", show_default="after the data")]
Data = Annotated[str | None, typer.Option(help="digits, mnist, fashion-mnist or a file.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with the idx files of mnist.")]
DataOnCluster = Annotated[
    bool, typer.Option("--data-on-cluster", help="The data's paths are the head's; none are sent.")
]
Trials = Annotated[int | None, typer.Option(help="Configurations to try.")]
MaxEpochs = Annotated[int | None, typer.Option(help="Epochs of a trial that is not stopped early.")]
Seed = Annotated[int | None, typer.Option(help="Seed of split, suggestions and trials.")]
Goal = Annotated[str | None, typer.Option(help="best-model or compare-activations.")]
CpusPerTrial = Annotated[int | None, typer.Option(help="Cores of a trial.")]
GpusPerTrial = Annotated[str | None, typer.Option(help="GPUs of a trial: 0, a share, a number, or auto.")]
Concurrency = Annotated[str | None, typer.Option(help="Trials at once, or auto.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key: --set train.beta=0.5")
]
Confirm = Annotated[
    bool, typer.Option("--confirm", help="Then train the best of each activation anew, from fresh seeds.")
]
Extend = Annotated[int, typer.Option(help="More trials for a study that is complete.", min=0)]
Address = Annotated[str | None, typer.Option(help="A Ray cluster to join.", envvar="RAY_ADDRESS")]
Dashboard = Annotated[
    str | None, typer.Option("--address", help="The cluster: its dashboard's HTTP address.", envvar="RAY_ADDRESS")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Also over plain HTTP to another machine, where the token can be read.")
]
Loggers = Annotated[
    list[str] | None,
    typer.Option("--logger", help="Tell tensorboard, mlflow or wandb, too; may be given more than once."),
]
WarmStart = Annotated[
    str | None,
    typer.Option(metavar="STUDY|FILE", help="Try the best configurations of a study, or of a .csv or .parquet, first."),
]
Onnx = Annotated[
    bool | None,
    typer.Option("--onnx/--no-onnx", help="ONNX files, too.", show_default="if its packages are installed"),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The study's name.")]


def say(text: str) -> None:
    tell(f"vaesearch: {text}")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def is_onnx_written(asked: bool | None) -> bool:
    """Raises InputError where it is asked for and its packages are missing; says how to get them where it is not."""
    from vae.portable import how_to_get_onnx, missing_onnx_packages

    if asked is False or not missing_onnx_packages():
        return asked is not False
    if asked:
        raise InputError(how_to_get_onnx())
    say(f"no ONNX files: {how_to_get_onnx()}")
    return False


def tell_refused(folder: "Path | str") -> None:
    """The files of an exported model that differed from it, or could not be written."""
    from vae.export import read_config

    for name, why in (read_config(folder).get("refused") or {}).items():
        say(f"{Path(folder) / name}: refused: {why}")


def study_folder(storage: str, study: str) -> "Location":
    from search.storage import location

    return location(storage) / study


def is_from_environment(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "ENVIRONMENT"


def spec_of(file: "Location | None", assignments: list[str] | None, flags: dict[str, Any]) -> "StudySpec":
    from search.spec import StudySpec

    return StudySpec.load(file, overrides_of(assignments, flags))


def overrides_of(assignments: list[str] | None, flags: dict[str, Any]) -> dict[str, object]:
    """The keys of a study that were given, by flags or by --set. Flags that stand for no key are passed over."""
    from search.study_file import FLAGS

    names = {key: flag.removeprefix("--").replace("-", "_") for key, flag in FLAGS.items()}
    given = {key: flags[name] for key, name in names.items() if flags.get(name) is not None}
    if "resources.concurrency" in given:
        given["resources.concurrency"] = _concurrency(given["resources.concurrency"])
    if flags.get("confirm"):
        given["finalists.confirm"] = True
    return given | _assignments(assignments or [])


def _concurrency(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _assignments(texts: list[str]) -> dict[str, object]:
    from search.study_file import parse_value

    pairs: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {text}: expected KEY=VALUE, for example --set train.beta=0.5")
        pairs[key.strip()] = parse_value(value.strip())
    return pairs


def console() -> "Console":
    from search.terminal import make_console

    return make_console()


def print_lines(lines: Iterable[str]) -> None:
    """For people: as wide as the terminal, and a line each where there is none."""
    from search.terminal import room, wrapped

    width = room(sys.stdout)
    for line in lines:
        print(line if width is None else wrapped(line, width))


@contextmanager
def ctrl_c_explained(what: str) -> Iterator[None]:
    """Here, or in a function that this decorates, Ctrl-C ends the command with how far it was, and with `what` there is
    of it and goes on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        say(" ".join(["interrupted", *getattr(interrupt, "__notes__", ())]) + f": {what}")
        raise typer.Exit(128 + signal.SIGINT) from None


def print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, allow_nan=False))
