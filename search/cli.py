"""`vaesearch`: parse, call one function, print. Results go to stdout, progress and errors to stderr."""

import os
import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from search.interrupts import LEFT_BEHIND, Interrupted, remember_interrupts
from vae.config import InputError

if TYPE_CHECKING:
    from search.results import Study
    from search.spec import StudySpec
    from search.storage import Location

app = typer.Typer(
    name="vaesearch",
    help="Settle activation, dropout, slopes, learning rate and latent size of a VAE on your data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_STORAGE = "studies"

Storage = Annotated[str, typer.Option(help="Folder or URL of the studies.", envvar="VAESEARCH_STORAGE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="Name of the study.")]
MovedData = Annotated[str | None, typer.Option("--data", help="The data, if they have moved.")]
MovedDir = Annotated[str | None, typer.Option("--data-dir", help="Folder with the idx files, if it has moved.")]
Concurrency = Annotated[str | None, typer.Option(help="Trials at once, or auto.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key: --set train.beta=0.5")
]
Confirm = Annotated[
    bool, typer.Option("--confirm", help="Then train the best of each activation anew, from fresh seeds.")
]
Extend = Annotated[int, typer.Option(help="More trials for a study that is complete.", min=0)]
Address = Annotated[str | None, typer.Option(help="A Ray cluster to join.", envvar="RAY_ADDRESS")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("vaesearch"))
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """The options that stand before a command; `main` takes --debug out wherever it stands."""


@app.command()
def run(
    study_file: Annotated[Path | None, typer.Argument(help="A study file, TOML or YAML; none: the defaults.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study.  [default: after the data]")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or URL of the studies.  [default: studies]", envvar="VAESEARCH_STORAGE")
    ] = None,
    data: Annotated[str | None, typer.Option(help="digits, mnist, fashion-mnist or a file.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the idx files of mnist.")] = None,
    trials: Annotated[int | None, typer.Option(help="Configurations to try.")] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Epochs of a trial that is not stopped early.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, suggestions and trials.")] = None,
    goal: Annotated[str | None, typer.Option(help="best-model or compare-activations.")] = None,
    cpus_per_trial: Annotated[int | None, typer.Option(help="Cores of a trial.")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(help="GPUs of a trial: 0, a share, or a number.")] = None,
    concurrency: Concurrency = None,
    confirm: Confirm = False,
    set_: Assignments = None,
    extend: Extend = 0,
    address: Address = None,
    json: Json = False,
) -> None:
    """Start a study, or go on with it. Without arguments: the digits, in half a minute."""
    from search.spec import StudySpec

    flags = {
        "name": name,
        "storage.path": storage,
        "data.source": data,
        "data.data_dir": data_dir,
        "budget.trials": trials,
        "budget.max_epochs": max_epochs,
        "seed": seed,
        "goal": goal,
        "finalists.confirm": confirm or None,
        "resources.cpus_per_trial": cpus_per_trial,
        "resources.gpus_per_trial": gpus_per_trial,
        "resources.concurrency": _concurrency(concurrency),
    }
    _run(StudySpec.load(study_file, _overrides(flags, set_)), address, extend, json)


@app.command()
def resume(
    study: Name,
    storage: Storage = DEFAULT_STORAGE,
    data: MovedData = None,
    data_dir: MovedDir = None,
    concurrency: Concurrency = None,
    confirm: Confirm = False,
    set_: Assignments = None,
    extend: Extend = 0,
    address: Address = None,
    json: Json = False,
) -> None:
    """Go on with a study by its name: what `run` does with the study file in its folder."""
    from search.results import STUDY_FILE, open_study
    from search.spec import StudySpec

    flags = {
        "storage.path": storage,  # it may have been moved here
        "name": study,
        "data.source": data,
        "data.data_dir": data_dir,
        "resources.concurrency": _concurrency(concurrency),
        "finalists.confirm": confirm or None,
    }
    opened = open_study(_folder(storage, study))
    _run(StudySpec.load(opened.path / STUDY_FILE, _overrides(flags, set_)), address, extend, json)


@app.command(name="list")
def list_(storage: Storage = DEFAULT_STORAGE, json: Json = False) -> None:
    """The studies of a folder, with their best."""
    from search.leaderboard import as_json, studies_table
    from search.results import readable_studies

    studies = readable_studies(storage)
    if json:
        _print_json([as_json(study) for study in studies])
    elif studies:
        _console().print(studies_table(studies))
    else:
        raise InputError(f"{storage}: there is no study there; `vaesearch run` makes one")


@app.command()
def show(
    study: Name,
    storage: Storage = DEFAULT_STORAGE,
    trials: Annotated[bool, typer.Option("--trials", help="Every trial, too.")] = False,
    json: Json = False,
) -> None:
    """What a study found so far; also while it runs."""
    from search.leaderboard import as_json, print_study, trials_table
    from search.results import open_study

    opened = open_study(_folder(storage, study))
    if json:
        _print_json(as_json(opened))
        return
    if trials:
        _console().print(trials_table(opened.rows()))
    print_study(_console(), opened)


@app.command()
def compare(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Several: one a data set, ranked over all.")],
    storage: Storage = DEFAULT_STORAGE,
    a: Annotated[str | None, typer.Option("--a", help="One activation, to be held against --b.")] = None,
    b: Annotated[str | None, typer.Option("--b", help="The other one.")] = None,
    importances: Annotated[
        bool, typer.Option("--importances", help="Also which parameters decided; a few seconds more.")
    ] = False,
    json: Json = False,
) -> None:
    """Which activation is best, how sure that is, and what each costs; also while it runs."""
    from dataclasses import asdict

    from search.comparison import as_plain, compare, document, pair
    from search.comparison_table import print_across, print_comparison, print_pair
    from search.results import open_study

    if (a is None) != (b is None) or (a is not None and len(studies) > 1):
        raise InputError("--a and --b go together, with one study: --a relu --b silu")
    comparisons = [compare(open_study(_folder(storage, name)), importances=importances or json) for name in studies]
    first = comparisons[0]
    if a is not None and b is not None:
        found = pair(first, a, b)
        if json:
            _print_json(as_plain({"study": first.study, "setting": first.setting, "pair": asdict(found)}))
        else:
            print_pair(_console(), first, found)
    elif len(comparisons) > 1:
        from search.across import across
        from search.across import document as document_across

        ranks = across(comparisons)
        if json:
            _print_json(document_across(ranks, comparisons))
        else:
            print_across(_console(), ranks)
    elif json:
        _print_json(document(first))
    else:
        print_comparison(_console(), first, with_importances=importances)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="One SELECT over studies, trials, epochs and the other tables.")],
    storage: Storage = DEFAULT_STORAGE,
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A file instead of stdout.")] = None,
) -> None:
    """SQL over the results, read-only, also while studies run."""
    from search.output import write_table
    from search.sql import query as run_query

    write_table(run_query(sql, storage), format, output)


@app.command()
def report(
    study: Name,
    storage: Storage = DEFAULT_STORAGE,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="File or URL to write.  [default: report.html in the study's folder]"),
    ] = None,
    light: Annotated[bool, typer.Option("--light", help="Small, for mail: still figures and no script.")] = False,
) -> None:
    """One page of all that a study found, to keep, mail or print; also while it runs."""
    from search.report import write_report
    from search.results import open_study

    print(write_report(open_study(_folder(storage, study)), output, light=light))


@app.command()
def export(
    study: Name,
    storage: Storage = DEFAULT_STORAGE,
    top: Annotated[int, typer.Option(help="How many of the best.", min=1)] = 1,
    to: Annotated[Path, typer.Option(help="The folder to write.")] = Path("models"),
    data: MovedData = None,
    data_dir: MovedDir = None,
    json: Json = False,
) -> None:
    """Write the best models into a folder, each checked after it was written."""
    from dataclasses import replace

    from search.publish import export_best
    from search.results import open_study
    from vae.data import load_data

    opened = open_study(_folder(storage, study))
    config = opened.spec.data_config()
    config = replace(config, source=data or config.source, data_dir=data_dir or config.data_dir)
    folders = export_best(opened, load_data(config), top, to)
    if json:
        _print_json([str(folder) for folder in folders])
    else:
        print("\n".join(map(str, folders)))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of an exported model.")],
    data: Annotated[str | None, typer.Option(help="Data to evaluate on.  [default: those it was made on]")] = None,
    data_dir: MovedDir = None,
    importance_samples: Annotated[int, typer.Option(help="Latents drawn for each row.")] = 5000,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the latents' noise.")] = 0,
    rows: Annotated[int | None, typer.Option(help="The first rows of the split alone.")] = None,
    per_image: Annotated[bool, typer.Option("--per-image", help="Values of each row, into the file of -o.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .parquet or .csv file.")] = None,
    json: Json = False,
) -> None:
    """The likelihood of data under an exported model, by importance sampling."""
    from search.output import plain, write_table

    format = "" if output is None else output.suffix.lower().lstrip(".")
    if per_image != (output is not None) or (per_image and format not in ("parquet", "csv")):
        raise InputError("--per-image and -o FILE go together; the file ends in .parquet or .csv")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"{output}: cannot be written: {output.parent} is no folder")

    from search.evaluation import evaluate_model, evaluation_lines

    evaluation = evaluate_model(
        model,
        data=data,
        data_dir=data_dir,
        split=split,
        importance_samples=importance_samples,
        seed=seed,
        rows=rows,
        say=lambda text: print(f"vaesearch: {text}", file=sys.stderr, flush=True),
    )
    if output is not None:
        write_table(evaluation.per_image(), format, output)
    if json:
        _print_json(plain(evaluation.document()))
    else:
        print("\n".join(evaluation_lines(evaluation)))


@app.command()
def data(
    data_dir: Annotated[str | None, typer.Option(help="A folder to look in first.")] = None, json: Json = False
) -> None:
    """Which data sets are there, and how to get the rest."""
    from dataclasses import asdict

    from search.leaderboard import source_lines
    from vae.data import available_sources

    sources = available_sources(data_dir)
    if json:
        _print_json([asdict(source) for source in sources])
    else:
        print("\n".join(source_lines(sources)))


@app.command()
def init() -> None:
    """Print a study file with every key, its unit and its default."""
    from search.spec import StudySpec
    from search.study_file import commented_study_file

    print(commented_study_file(StudySpec()), end="")


def _run(spec: "StudySpec", address: str | None, extend: int, json: bool) -> None:
    from search.leaderboard import as_json, print_study
    from search.progress import Progress
    from search.study import run_study

    with Progress() as progress:
        try:
            study = run_study(spec, address=address, extend=extend, events=[progress], say=progress.say)
        except Interrupted as interrupted:
            again = shlex.join(["vaesearch", *_without_extend(sys.argv[1:])])
            progress.say(f"interrupted {progress.where()}; go on with: {again}")
            raise typer.Exit(128 + interrupted.signum) from None
    if study.spec.finalists.confirm:
        _tell_verdict(study, json)
    elif json:
        _print_json(as_json(study))
    else:
        print_study(_console(), study)


def _tell_verdict(study: "Study", json: bool) -> None:
    from search.comparison import compare, document
    from search.comparison_table import print_comparison
    from search.leaderboard import as_json, print_next

    comparison = compare(study, importances=json)
    if json:
        _print_json(as_json(study) | {"comparison": document(comparison)})
    else:
        print_comparison(_console(), comparison)
        print_next(_console(), study, study.summary())


def main() -> None:
    """The command. Exit status: 0 done, 1 failed, 2 wrong usage or file, 130 and 143 interrupted."""
    remember_interrupts()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    try:
        app(args=arguments)
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 0)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        print(f"vaesearch: {error or type(error).__name__}", file=sys.stderr)
        _leave(2 if isinstance(error, InputError) else 1)


def _leave(code: int) -> NoReturn:
    """End the process; at once where a storage that does not answer would hold up the usual end."""
    if any(thread.name == LEFT_BEHIND for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _folder(storage: str, study: str) -> "Location":
    from search.storage import location

    return location(storage) / study


def _overrides(flags: dict[str, Any], assignments: list[str] | None) -> dict[str, object]:
    """The keys that were given, by their own flags or by --set."""
    return {key: value for key, value in flags.items() if value is not None} | _assignments(assignments or [])


def _concurrency(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdigit() else text


def _assignments(texts: list[str]) -> dict[str, object]:
    from search.study_file import parse_value

    pairs: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {text}: expected KEY=VALUE, for example --set train.beta=0.5")
        pairs[key.strip()] = parse_value(value.strip())
    return pairs


def _without_extend(arguments: list[str]) -> list[str]:
    """The command that goes on: an extension has been noted in the study and is not asked for twice."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--extend"):
            skip = argument == "--extend"
            continue
        kept.append(argument)
    return kept


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
