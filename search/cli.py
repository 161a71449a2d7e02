"""`vaesearch`: parse, call one function, print. Results go to stdout, progress and errors to stderr."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from search.interrupts import Interrupted, remember_interrupts
from search.layout import DEFAULT_STORAGE
from search.status import end_with_status
from vae.config import InputError

if TYPE_CHECKING:
    from cluster.jobs import Jobs
    from search.results import Study
    from search.spec import StudySpec
    from search.storage import Location

T = TypeVar("T")

app = typer.Typer(
    name="vaesearch",
    help="Settle activation, dropout, slopes, learning rate and latent size of a VAE on your data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

GOING_ON = "the same submit, without any --extend, goes on"  # an extension was noted in the study
CLUSTERS = "Commands for a Ray cluster"

KEYS = {
    "name": "name",
    "storage": "storage.path",
    "data": "data.source",
    "data_dir": "data.data_dir",
    "trials": "budget.trials",
    "max_epochs": "budget.max_epochs",
    "seed": "seed",
    "goal": "goal",
    "cpus_per_trial": "resources.cpus_per_trial",
    "gpus_per_trial": "resources.gpus_per_trial",
    "concurrency": "resources.concurrency",
}
"""Flags that stand for a key of the study file."""

Storage = Annotated[str, typer.Option(help="Folder or URL of the studies.", envvar="VAESEARCH_STORAGE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="Name of the study.")]
MovedData = Annotated[str | None, typer.Option("--data", help="The data, if they have moved.")]
MovedDir = Annotated[str | None, typer.Option("--data-dir", help="Folder with the idx files, if it has moved.")]
StudyFile = Annotated[Path | None, typer.Argument(help="A study file, TOML or YAML; none: the defaults.")]
NewName = Annotated[str | None, typer.Option("--name", help="Name of the study.  [default: after the data]")]
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
JobId = Annotated[str, typer.Argument(metavar="ID", help="The study's name.")]


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
    study_file: StudyFile = None,
    name: NewName = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or URL of the studies.  [default: studies]", envvar="VAESEARCH_STORAGE")
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
    json: Json = False,
) -> None:
    """Start a study, or go on with it. Without arguments: the digits, in half a minute."""
    _run(_spec(study_file, set_, locals()), address, extend, json)


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

    opened = open_study(_folder(storage, study))
    flags = locals() | {"name": study}  # and the storage: it may have been moved here
    _run(_spec(opened.path / STUDY_FILE, set_, flags), address, extend, json)


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
        _tell_standings(address, insecure, json)
        return
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
    from search.output import write_rows, write_table
    from search.sql import query as run_query
    from search.sql import query_rows

    if format == "table":
        write_rows(query_rows(sql, storage), output)
    else:
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
        say=_say,
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


@app.command(rich_help_panel=CLUSTERS)
def doctor(
    context: typer.Context,
    study_file: StudyFile = None,
    address: Annotated[
        str | None, typer.Option(help="A cluster to join or to submit to; none: this machine.", envvar="RAY_ADDRESS")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or URL of the studies.  [default: studies]", envvar="VAESEARCH_STORAGE")
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    data_on_cluster: DataOnCluster = False,
    set_: Assignments = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Is all there that a study needs, here or on a cluster? Each check with what would mend it."""
    from dataclasses import asdict

    from search.doctor import examine, print_checks

    if address is not None:
        _say(f"cluster {address}")
        if address.startswith(("http://", "https://")) and _is_from_environment(context, "storage"):
            storage = None  # it names a place of this machine; submit does not heed it either
    checks = examine(
        study_file,
        address=address,
        overrides=_overrides(set_, locals()),
        insecure=insecure,
        data_on_cluster=data_on_cluster,
        say=_say,
    )
    if json:
        _print_json([asdict(check) for check in checks])
    else:
        print_checks(_console(), checks)
    if any(check.verdict == "failed" for check in checks):
        raise typer.Exit(1)


@app.command(rich_help_panel=CLUSTERS)
def submit(
    study_file: StudyFile = None,
    name: NewName = None,
    storage: Annotated[
        str | None, typer.Option(help="URL, or absolute path on the head.  [default: the cluster's own]")
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    data_on_cluster: DataOnCluster = False,
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
    address: Dashboard = None,
    insecure: Insecure = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until the driver is at work.")] = False,
    json: Json = False,
) -> None:
    """Start a study on a Ray cluster, or go on with it there; files of data up to 99 MiB are sent along."""
    from search.submit import standing_of, unheeded, wait_for_start
    from search.submit import submit as submit_study

    if storage is not None and "://" not in storage and not Path(storage).is_absolute():
        raise InputError(f"--storage {storage}: give a URL, or an absolute path on the head of the cluster")
    spec = _spec(study_file, set_, locals())
    jobs = _jobs(address, insecure)
    job, is_new = submit_study(jobs, spec, extend=extend, data_on_cluster=data_on_cluster)
    if not is_new:
        _say(f"{spec.name}: is there already, {job.state}")
        if keys := unheeded(job, spec):
            _say(f"{spec.name}: runs with its own {', '.join(keys)}; to change that, stop it and submit it again")
    elif not no_wait:
        _say(f"{spec.name}: submitted; its driver starts and makes its checks")
        status = _undisturbed(lambda: wait_for_start(jobs, job, _tell), jobs.address, job.job_id)
        if status:
            raise typer.Exit(status)
    if json:
        _print_json(standing_of(jobs, jobs.get(job.job_id) or job).document() | {"address": jobs.address})
    else:
        print("\n".join(_next_commands(jobs.address, job.job_id)))


@app.command(rich_help_panel=CLUSTERS)
def status(
    study: Annotated[
        str | None, typer.Argument(metavar="ID", help="One study; none: all that the cluster knows.")
    ] = None,
    address: Dashboard = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """How the studies on a cluster stand."""
    if study is None:
        _tell_standings(address, insecure, json)
        return
    from search.submit import existing, standing_of

    jobs = _jobs(address, insecure)
    standing = standing_of(jobs, existing(jobs, study))
    if json:
        _print_json(standing.document())
    else:
        print("\n".join(standing.lines()))
    if standing.state == "FAILED":
        raise typer.Exit(1)


@app.command(rich_help_panel=CLUSTERS)
def logs(
    study: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the study ends.")] = False,
    address: Dashboard = None,
    insecure: Insecure = False,
) -> None:
    """What the driver of a study on a cluster has said. With -f, exit status 1 if it fails."""
    from search.submit import existing

    jobs = _jobs(address, insecure)
    existing(jobs, study)
    if not follow:
        print(jobs.logs(study), end="")
        return

    def tell_all() -> None:
        for line in jobs.follow(study, _say):
            print(line, flush=True)

    _undisturbed(tell_all, jobs.address, study)
    ended = existing(jobs, study)
    _say(f"{study}: {ended.state}" + ("; vaesearch fetch brings its results" if ended.state == "SUCCEEDED" else ""))
    if ended.state == "FAILED":
        raise typer.Exit(1)


@app.command(rich_help_panel=CLUSTERS)
def stop(study: JobId, address: Dashboard = None, insecure: Insecure = False, json: Json = False) -> None:
    """End a study on a cluster, once all that it found is on disk; the same submit, less an --extend, goes on."""
    from search.submit import stop as stop_study

    jobs = _jobs(address, insecure)
    is_flushed = stop_study(jobs, study)
    if json:
        _print_json({"id": study, "was_running": is_flushed is not None, "is_flushed": is_flushed})
    elif is_flushed is None:
        print(f"{study}: had ended before")
    elif is_flushed:
        print(f"{study}: stopped, all that it found is on disk; {GOING_ON}")
    else:
        print(f"{study}: killed before it had written its last rows; {GOING_ON} from those on disk")
        _say("the cluster gives a job RAY_JOB_STOP_WAIT_TIME_S seconds to end, 3 unless its head was started with more")


@app.command(rich_help_panel=CLUSTERS)
def fetch(
    study: JobId,
    to: Annotated[Path, typer.Option(help="The folder of studies to put it in.")] = Path(DEFAULT_STORAGE),
    address: Dashboard = None,
    insecure: Insecure = False,
) -> None:
    """Copy a study from a cluster to here, also while it runs; an older copy of it is replaced."""
    from search.fetch import fetch as fetch_study

    print(fetch_study(_jobs(address, insecure), study, to, _say))


@app.command(hidden=True)
def supervise(
    study_file: Annotated[Path, typer.Argument(help="The study file of a job.")],
    storage: Annotated[str | None, typer.Option(help="What the study says of it.")] = None,
    extend: Extend = 0,
) -> None:
    """The entry point of a submitted study: `run`, started again where something ends it."""
    from search.supervisor import supervise as supervise_study

    raise typer.Exit(supervise_study(study_file, storage, extend, _tell))


@app.command(hidden=True)
def pack(
    study: Name,
    storage: Annotated[str | None, typer.Option(help="What the study says of it.")] = None,
    archive: Annotated[str | None, typer.Option(help="What an earlier call has named.")] = None,
    offset: Annotated[int, typer.Option(help="What of it has been fetched.", min=0)] = 0,
) -> None:
    """What `fetch` runs on the head of a cluster."""
    from search.fetch import pack as pack_study
    from search.fetch import pack_on

    for line in pack_study(study, storage) if archive is None else [pack_on(archive, offset)]:
        print(line)


def _run(spec: "StudySpec", address: str | None, extend: int, json: bool) -> None:
    from search.leaderboard import as_json, print_study
    from search.progress import Progress
    from search.study import run_study
    from search.supervisor import SUPERVISED_VARIABLE, end_with_supervisor

    end_with_supervisor()
    with Progress() as progress:
        try:
            study = run_study(spec, address=address, extend=extend, events=[progress], say=progress.say)
        except Interrupted as interrupted:
            again = f"go on with: {shlex.join(['vaesearch', *_without_extend(sys.argv[1:])])}"
            if SUPERVISED_VARIABLE in os.environ:
                again = GOING_ON
            progress.say(f"interrupted {progress.where()}; {again}")
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


def _jobs(address: str | None, insecure: bool) -> "Jobs":
    """The jobs of a cluster, whose address is told: it may have come from the environment."""
    from search.submit import connect

    if address is None:
        raise InputError("which cluster? Give --address http://127.0.0.1:8265, or set RAY_ADDRESS to that")
    jobs = connect(address, insecure=insecure)
    _say(f"cluster {jobs.address}")
    return jobs


def _tell_standings(address: str | None, insecure: bool, json: bool) -> None:
    from search.submit import standing_lines, standings

    found = standings(_jobs(address, insecure))
    if json:
        _print_json([standing.document() for standing in found])
    elif found:
        print("\n".join(standing_lines(found)))
    else:
        print("no study there; `vaesearch submit` starts one")


def _undisturbed(wait: Callable[[], T], address: str, study: str) -> T:
    """What a wait for a job returns; Ctrl-C ends the wait alone, and says so."""
    try:
        return wait()
    except KeyboardInterrupt:
        _say(f"{study} goes on without us; {_next_commands(address, study)[2].strip()} ends it")
        raise typer.Exit(130) from None


def _next_commands(address: str, study: str) -> list[str]:
    where = "" if address == os.environ.get("RAY_ADDRESS") else f" --address {shlex.quote(address)}"
    return [f"  vaesearch {command} {study}{where}" for command in ("status", "logs -f", "stop", "fetch")]


def _say(text: str) -> None:
    _tell(f"vaesearch: {text}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> NoReturn:
    """The command; see `search.status` for how it ends."""
    remember_interrupts()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    end_with_status(lambda: app(args=arguments), is_debugging=len(arguments) < len(sys.argv) - 1)


def _folder(storage: str, study: str) -> "Location":
    from search.storage import location

    return location(storage) / study


def _is_from_environment(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "ENVIRONMENT"


def _spec(file: "Location | None", assignments: list[str] | None, flags: dict[str, Any]) -> "StudySpec":
    from search.spec import StudySpec

    return StudySpec.load(file, _overrides(assignments, flags))


def _overrides(assignments: list[str] | None, flags: dict[str, Any]) -> dict[str, object]:
    """The keys of a study that were given, by flags or by --set. Flags that stand for no key are passed over."""
    given = {key: flags[flag] for flag, key in KEYS.items() if flags.get(flag) is not None}
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
