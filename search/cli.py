"""`vaesearch`: parse, call one function, print. Results go to stdout, progress and errors to stderr."""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from search import cli_again, cli_cluster, cli_models
from search.cli_cluster import GOING_ON
from search.cli_options import (
    ANEW,
    Address,
    Assignments,
    Concurrency,
    Confirm,
    CpusPerTrial,
    Data,
    DataDir,
    Extend,
    Goal,
    GpusPerTrial,
    Insecure,
    Json,
    Loggers,
    MaxEpochs,
    MovedData,
    MovedDir,
    Name,
    NewName,
    Onnx,
    Seed,
    Storage,
    StudyFile,
    Trials,
    WarmStart,
    complete_activation,
    complete_study,
    console,
    ctrl_c_explained,
    is_onnx_written,
    print_json,
    print_lines,
    say,
    spec_of,
    study_folder,
    tell_refused,
)
from search.interrupts import Interrupted, remember_interrupts
from search.layout import DEFAULT_STORAGE
from search.status import end_with_status
from vae.config import InputError

if TYPE_CHECKING:
    from search.comparison import Comparison
    from search.results import Study
    from search.spec import StudySpec

app = typer.Typer(
    name="vaesearch",
    help="Settle activation, dropout, slopes, learning rate and latent size of a VAE on your data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODELS = "Use a model"


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
@ctrl_c_explained(ANEW)
def run(
    study_file: StudyFile = None,
    name: NewName = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Folder or URL of the studies.", envvar="VAESEARCH_STORAGE", show_default=DEFAULT_STORAGE),
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    trials: Trials = None,
    max_epochs: MaxEpochs = None,
    seed: Seed = None,
    goal: Goal = None,
    cpus_per_trial: CpusPerTrial = None,
    gpus_per_trial: GpusPerTrial = None,
    concurrency: Concurrency = None,
    confirm: Confirm = False,
    set_: Assignments = None,
    extend: Extend = 0,
    address: Address = None,
    warm_start: WarmStart = None,
    logger: Loggers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and about what it takes.")
    ] = False,
    json: Json = False,
) -> None:
    """Start a study, or go on with it. Without arguments: the digits, in half a minute."""
    spec = spec_of(study_file, set_, locals())
    if warm_start is not None:
        from search.warm_start import warm_started

        spec = warm_started(spec, warm_start, say)
    if dry_run:
        from search.trackers import backends

        backends(logger or (), spec)  # refused as the run would be
        _tell_plan(spec, address, extend, json)
    else:
        _run(spec, address, extend, logger, json)


@app.command()
@ctrl_c_explained(ANEW)
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
    logger: Loggers = None,
    json: Json = False,
) -> None:
    """Go on with a study by its name: what `run` does with the study file in its folder."""
    from search.results import STUDY_FILE, open_study

    opened = open_study(study_folder(storage, study))
    flags = locals() | {"name": study}  # and the storage: it may have been moved here
    _run(spec_of(opened.path / STUDY_FILE, set_, flags), address, extend, logger, json)


@app.command(name="list")
def list_(
    storage: Storage = DEFAULT_STORAGE,
    address: Annotated[str | None, typer.Option(help="Those of a cluster, by its dashboard's HTTP address.")] = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """The studies of a folder, with their best; or with --address those that a cluster knows."""
    from search.leaderboard import as_json, studies_table
    from search.results import readable_studies

    if address is not None:
        cli_cluster.tell_standings(address, insecure, json)
        return
    studies = readable_studies(storage)
    if json:
        print_json([as_json(study) for study in studies])
    elif studies:
        console().print(studies_table(studies), soft_wrap=True)
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

    opened = open_study(study_folder(storage, study))
    if json:
        print_json(as_json(opened))
        return
    if trials:
        console().print(trials_table(opened.rows()), soft_wrap=True)
    print_study(console(), opened)


@app.command()
@ctrl_c_explained("the same command begins anew")
def compare(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY...", help="Several: one a data set, ranked over all.", autocompletion=complete_study
        ),
    ],
    storage: Storage = DEFAULT_STORAGE,
    a: Annotated[
        str | None,
        typer.Option("--a", help="One activation, to be held against --b.", autocompletion=complete_activation),
    ] = None,
    b: Annotated[str | None, typer.Option("--b", help="The other one.", autocompletion=complete_activation)] = None,
    importances: Annotated[
        bool, typer.Option("--importances", help="Also which parameters decided; a few seconds more.")
    ] = False,
    json: Json = False,
) -> None:
    """Which activation is best, how sure that is, and what each costs; also while it runs."""
    from dataclasses import asdict

    from search.comparison import as_plain, compare, document, pair
    from search.comparison_table import print_across, print_comparison, print_pair
    from search.progress import counting
    from search.results import open_study

    if (a is None) != (b is None) or (a is not None and len(studies) > 1):
        raise InputError("--a and --b go together, with one study: --a relu --b silu")
    comparisons: list[Comparison] = []
    with counting("studies") as count:
        for name in studies:
            count(len(comparisons), len(studies), name)
            opened = open_study(study_folder(storage, name))
            comparisons.append(compare(opened, importances=importances or json))
    first = comparisons[0]
    if a is not None and b is not None:
        found = pair(first, a, b)
        if json:
            print_json(as_plain({"study": first.study, "setting": first.setting, "pair": asdict(found)}))
        else:
            print_pair(console(), first, found)
    elif len(comparisons) > 1:
        from search.across import across
        from search.across import document as document_across

        ranks = across(comparisons)
        if json:
            print_json(document_across(ranks, comparisons))
        else:
            print_across(console(), ranks)
    elif json:
        print_json(document(first))
    else:
        print_comparison(console(), first, with_importances=importances)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="One SELECT over studies, trials, epochs and the other tables.")],
    storage: Storage = DEFAULT_STORAGE,
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A file instead of stdout.")] = None,
) -> None:
    """SQL over the results, read-only, also while studies run."""
    from search.output import write_rows, write_table
    from search.sql import query as run_query
    from search.sql import query_rows

    if format == "table":
        write_rows(query_rows(sql, storage), output)
    else:
        write_table(run_query(sql, storage), format, output)


@app.command()
@ctrl_c_explained("no page was written; the same command begins anew")
def report(
    study: Name,
    storage: Storage = DEFAULT_STORAGE,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="File or URL to write.", show_default="report.html in the study's folder"),
    ] = None,
    light: Annotated[bool, typer.Option("--light", help="Small, for mail: still figures and no script.")] = False,
    json: Json = False,
) -> None:
    """One page of all that a study found, to keep, mail or print; also while it runs."""
    from search.progress import counting
    from search.report import write_report
    from search.results import open_study

    opened = open_study(study_folder(storage, study))
    with counting("parts", is_even=False) as count:
        page = write_report(opened, output, light=light, tell=count)
    if json:
        print_json({"study": study, "path": str(page), "light": light})
    else:
        print(page)


@app.command()
def dashboard(
    study: Name,
    storage: Storage = DEFAULT_STORAGE,
    port: Annotated[int, typer.Option(help="On loopback.", min=1, max=65535)] = 8080,
) -> None:
    """Optuna's dashboard on a mirror of a study, on loopback; it follows one that runs. Needs optuna-dashboard."""
    from search.optuna_study import serve_dashboard
    from search.results import open_study

    serve_dashboard(open_study(study_folder(storage, study)), port, say)


@app.command()
@ctrl_c_explained("models that were done are whole, of others there is nothing; the same command begins anew")
def export(
    study: Name,
    storage: Storage = DEFAULT_STORAGE,
    top: Annotated[int, typer.Option(help="How many of the best.", min=1)] = 1,
    to: Annotated[Path, typer.Option(help="The folder to write.")] = Path("models"),
    data: MovedData = None,
    data_dir: MovedDir = None,
    onnx: Onnx = None,
    json: Json = False,
) -> None:
    """Write the best models into a folder, each file checked after it was written."""
    from search.checks import own_data
    from search.progress import counting
    from search.publish import export_best
    from search.results import open_study

    with_onnx = is_onnx_written(onnx)
    opened = open_study(study_folder(storage, study))
    with counting("models") as count:
        own = own_data(opened, data, data_dir)
        folders = export_best(opened, own, top, to, programs=True, onnx=with_onnx, tell=count)
    for folder in folders:
        tell_refused(folder)
    if others := sorted(path.name for path in to.glob("[0-9]*-trial-*") if path not in folders):
        say(f"{to} also has models of an earlier export: {', '.join(others)}")
    if json:
        print_json([str(folder) for folder in folders])
    else:
        print("\n".join(map(str, folders)))


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
        print_json([asdict(source) for source in sources])
    else:
        print_lines(source_lines(sources))


@app.command()
def init(
    kind: Annotated[
        str | None, typer.Option("--for", help="For images, grey-images, tables or counts: with what those need.")
    ] = None,
) -> None:
    """Print a study file with every key, its unit and its default."""
    from search.spec import StudySpec
    from search.study_file import KINDS, commented_study_file

    if kind is None:
        print(commented_study_file(StudySpec()), end="")
        return
    if kind not in KINDS:
        raise InputError(f"--for {kind}: known are {', '.join(KINDS)}")
    chosen = KINDS[kind]
    print(commented_study_file(StudySpec.model_validate(chosen.values), chosen.description), end="")


@app.command()
def env(json: Json = False) -> None:
    """What a report of a fault should say: versions, machine, settings. No secret is told."""
    from search.environment import describe, environment_lines

    found = describe()
    if json:
        print_json(found)
    else:
        print_lines(environment_lines(found))


PANELS: dict[str | None, tuple[Callable[..., None], ...]] = {
    None: (cli_again.replay, cli_again.refit),
    MODELS: (
        cli_models.evaluate,
        cli_models.sample,
        cli_models.reconstruct,
        cli_models.encode,
        cli_models.decode,
        cli_models.interpolate,
        cli_models.traverse,
    ),
    "Commands for a Ray cluster": (
        cli_cluster.doctor,
        cli_cluster.submit,
        cli_cluster.status,
        cli_cluster.logs,
        cli_cluster.stop,
        cli_cluster.fetch,
    ),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
for command in (cli_cluster.supervise, cli_cluster.pack):
    app.command(hidden=True)(command)


def _run(spec: "StudySpec", address: str | None, extend: int, loggers: list[str] | None, json: bool) -> None:
    from search.leaderboard import as_json, print_study
    from search.progress import Progress
    from search.study import run_study
    from search.supervisor import SUPERVISED_VARIABLE, end_with_supervisor
    from search.trackers import tracking

    end_with_supervisor()
    with Progress() as progress, tracking(loggers or (), spec, progress.say) as trackers:
        try:
            study = run_study(spec, address=address, extend=extend, events=[progress, *trackers], say=progress.say)
        except (Interrupted, KeyboardInterrupt) as interrupted:  # the latter before the study was at work
            again = f"go on with: {shlex.join(['vaesearch', *_without_extend(sys.argv[1:])])}"
            if SUPERVISED_VARIABLE in os.environ:
                again = GOING_ON
            progress.say(f"interrupted {progress.where()}; {again}")
            signum = interrupted.signum if isinstance(interrupted, Interrupted) else signal.SIGINT
            raise typer.Exit(128 + signum) from None
    with ctrl_c_explained(f"all was written; vaesearch show {shlex.quote(study.name)} tells of it"):
        if study.spec.finalists.confirm:
            _tell_verdict(study, json)
        elif json:
            print_json(as_json(study))
        else:
            print_study(console(), study)


def _tell_plan(spec: "StudySpec", address: str | None, extend: int, json: bool) -> None:
    from dataclasses import asdict

    from search.plan import plan_lines, plan_study
    from search.progress import counting

    with counting("plans") as count:
        count(0, 1, "Ray starts, and an epoch is timed")
        plan = plan_study(spec, address=address, extend=extend)
    if json:
        print_json(asdict(plan))
    else:
        print_lines(plan_lines(plan))


def _tell_verdict(study: "Study", json: bool) -> None:
    from search.comparison import compare, document
    from search.comparison_table import print_comparison
    from search.leaderboard import as_json, print_next

    comparison = compare(study, importances=json)
    if json:
        print_json(as_json(study) | {"comparison": document(comparison)})
    else:
        print_comparison(console(), comparison)
        print_next(console(), study, study.summary())


def main() -> NoReturn:
    """The command; see `search.status` for how it ends."""
    remember_interrupts()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    end_with_status(lambda: app(args=arguments, prog_name="vaesearch"), is_debugging=len(arguments) < len(sys.argv) - 1)


def _without_extend(arguments: list[str]) -> list[str]:
    """The command that goes on: an extension has been noted in the study and is not asked for twice."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--extend"):
            skip = argument == "--extend"
            continue
        kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
