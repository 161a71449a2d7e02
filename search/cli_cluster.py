"""The commands for a Ray cluster. `search.cli` registers them."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from search.cli_options import (
    Assignments,
    Concurrency,
    Confirm,
    CpusPerTrial,
    Dashboard,
    Data,
    DataDir,
    DataOnCluster,
    Extend,
    Goal,
    GpusPerTrial,
    Insecure,
    JobId,
    Json,
    MaxEpochs,
    Name,
    NewName,
    Seed,
    StudyFile,
    Trials,
    console,
    ctrl_c_explained,
    is_from_environment,
    overrides_of,
    print_json,
    print_lines,
    say,
    spec_of,
    tell,
)
from search.layout import DEFAULT_STORAGE
from vae.config import InputError

if TYPE_CHECKING:
    from cluster.jobs import Jobs

T = TypeVar("T")

GOING_ON = "the same submit, without any --extend, goes on"  # an extension was noted in the study


@ctrl_c_explained("not all was looked at; the same command begins anew")
def doctor(
    context: typer.Context,
    study_file: StudyFile = None,
    address: Annotated[
        str | None, typer.Option(help="A cluster to join or to submit to; none: this machine.", envvar="RAY_ADDRESS")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Folder or URL of the studies.", envvar="VAESEARCH_STORAGE", show_default=DEFAULT_STORAGE),
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
        say(f"cluster {address}")
        if address.startswith(("http://", "https://")) and is_from_environment(context, "storage"):
            storage = None  # it names a place of this machine; submit does not heed it either
    checks = examine(
        study_file,
        address=address,
        overrides=overrides_of(set_, locals()),
        insecure=insecure,
        data_on_cluster=data_on_cluster,
        say=say,
    )
    if json:
        print_json([asdict(check) for check in checks])
    else:
        print_checks(console(), checks)
    if any(check.verdict == "failed" for check in checks):
        raise typer.Exit(1)


@ctrl_c_explained("vaesearch status tells whether it was submitted; the same command submits it, or finds it there")
def submit(
    study_file: StudyFile = None,
    name: NewName = None,
    storage: Annotated[
        str | None, typer.Option(help="URL, or absolute path on the head.", show_default="the cluster's own")
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
    spec = spec_of(study_file, set_, locals())
    jobs = _jobs(address, insecure)
    job, is_new = submit_study(jobs, spec, extend=extend, data_on_cluster=data_on_cluster)
    if not is_new:
        say(f"{spec.name}: is there already, {job.state}")
        if keys := unheeded(job, spec):
            say(f"{spec.name}: runs with its own {', '.join(keys)}; to change that, stop it and submit it again")
    elif not no_wait:
        say(f"{spec.name}: submitted; its driver starts and makes its checks")
        status = _undisturbed(lambda: wait_for_start(jobs, job, tell), jobs.address, job.job_id)
        if status:
            raise typer.Exit(status)
    if json:
        print_json(standing_of(jobs, jobs.get(job.job_id) or job).document() | {"address": jobs.address})
    else:
        print("\n".join(_next_commands(jobs.address, job.job_id)))


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
        tell_standings(address, insecure, json)
        return
    from search.submit import existing, standing_of

    jobs = _jobs(address, insecure)
    standing = standing_of(jobs, existing(jobs, study))
    if json:
        print_json(standing.document())
    else:
        print_lines(standing.lines())
    if standing.state == "FAILED":
        raise typer.Exit(1)


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
        for line in jobs.follow(study, say):
            print(line, flush=True)

    _undisturbed(tell_all, jobs.address, study)
    ended = existing(jobs, study)
    say(f"{study}: {ended.state}" + ("; vaesearch fetch brings its results" if ended.state == "SUCCEEDED" else ""))
    if ended.state == "FAILED":
        raise typer.Exit(1)


@ctrl_c_explained("it may have been asked to end, which vaesearch status tells; the same command asks again")
def stop(study: JobId, address: Dashboard = None, insecure: Insecure = False, json: Json = False) -> None:
    """End a study on a cluster, once all that it found is on disk; the same submit, less an --extend, goes on."""
    from search.submit import stop as stop_study

    jobs = _jobs(address, insecure)
    is_flushed = stop_study(jobs, study)
    if json:
        print_json({"id": study, "was_running": is_flushed is not None, "is_flushed": is_flushed})
    elif is_flushed is None:
        print(f"{study}: had ended before")
    elif is_flushed:
        print(f"{study}: stopped, all that it found is on disk; {GOING_ON}")
    else:
        print(f"{study}: killed before it had written its last rows; {GOING_ON} from those on disk")
        say("the cluster gives a job RAY_JOB_STOP_WAIT_TIME_S seconds to end, 3 unless its head was started with more")


@ctrl_c_explained("a copy that was here before is as it was; the same command begins anew")
def fetch(
    study: JobId,
    to: Annotated[Path, typer.Option(help="The folder of studies to put it in.")] = Path(DEFAULT_STORAGE),
    address: Dashboard = None,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Copy a study from a cluster to here, also while it runs; an older copy of it is replaced."""
    from search.fetch import fetch as fetch_study

    folder = fetch_study(_jobs(address, insecure), study, to, say)
    if json:
        print_json({"id": study, "path": str(folder)})
    else:
        print(folder)


def supervise(
    study_file: Annotated[Path, typer.Argument(help="The study file of a job.")],
    storage: Annotated[str | None, typer.Option(help="What the study says of it.")] = None,
    extend: Extend = 0,
) -> None:
    """The entry point of a submitted study: `run`, started again where something ends it."""
    from search.supervisor import supervise as supervise_study

    raise typer.Exit(supervise_study(study_file, storage, extend, tell))


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


def _jobs(address: str | None, insecure: bool) -> "Jobs":
    """The jobs of a cluster, whose address is told: it may have come from the environment."""
    from search.submit import connect

    if address is None:
        raise InputError("which cluster? Give --address http://127.0.0.1:8265, or set RAY_ADDRESS to that")
    jobs = connect(address, insecure=insecure)
    say(f"cluster {jobs.address}")
    return jobs


def tell_standings(address: str | None, insecure: bool, json: bool) -> None:
    from search.submit import standing_lines, standings

    found = standings(_jobs(address, insecure))
    if json:
        print_json([standing.document() for standing in found])
    elif found:
        print_lines(standing_lines(found))
    else:
        print("no study there; `vaesearch submit` starts one")


def _undisturbed(wait: Callable[[], T], address: str, study: str) -> T:
    """What a wait for a job returns; Ctrl-C ends the wait alone, and says so."""
    try:
        return wait()
    except KeyboardInterrupt:
        say(f"{study} goes on without us; {_next_commands(address, study)[2].strip()} ends it")
        raise typer.Exit(130) from None


def _next_commands(address: str, study: str) -> list[str]:
    where = "" if address == os.environ.get("RAY_ADDRESS") else f" --address {shlex.quote(address)}"
    return [f"  vaesearch {command} {study}{where}" for command in ("status", "logs -f", "stop", "fetch")]
