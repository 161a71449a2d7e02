"""`vaesearch doctor`: what must hold before the first trial, each with what would mend it. `run` looks at it, too.

Where the driver will run, it is looked at from there: here, or through a short job on a cluster.
"""

import contextlib
import json
import re
import shlex
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.head import ClusterUnreachable, find_head
from cluster.jobs import AccessDenied, AddressRefused, JobFailed, Jobs, UploadTooLarge, VersionMismatch
from cluster.preflight import Asked, Check, check_nodes, check_token_file
from cluster.runtime import Runtime, ray_runtime
from search.checks import check_batches, check_model
from search.results import STUDY_FILE
from search.spec import StudySpec
from search.storage import check_writable
from search.submit import storage_elsewhere, write_package
from search.supervisor import DEFAULT_STORAGE, STORAGE_VARIABLE
from vae.config import InputError
from vae.data import Dataset, load_data

if TYPE_CHECKING:
    from rich.console import Console

JOB_TIMEOUT_S = 120.0
NO_SUCH_COMMAND = 127  # a shell's exit status
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
MARGIN = 9  # for the longest verdict
NARROWEST = 20


def check_cluster(spec: StudySpec, data: Dataset, runtime: Runtime) -> list[Check]:
    """Whether the Ray that this process is connected to can run a study."""
    return check_nodes(runtime, _asked(spec), data_bytes=data.nbytes)


def refuse_if_failed(checks: Sequence[Check]) -> None:
    """Raises InputError with a line for each failed check."""
    failed = [_sentence(check) for check in checks if check.verdict == "failed"]
    if failed:
        raise InputError("\n".join(failed))


def examine(
    study_file: Path | None,
    *,
    address: str | None,
    overrides: Mapping[str, object],
    insecure: bool = False,
    data_on_cluster: bool = False,
    say: Callable[[str], None],
) -> list[Check]:
    """All checks of a study, none of which raises. Raises InputError for a study file or address that is wrong.

    address: None is this machine; an HTTP address is a cluster to submit to, seen from outside and then by its head;
    anything else is a cluster to join. insecure: also over plain HTTP beyond loopback. data_on_cluster: the data's
    paths are those of the head.
    """
    spec = StudySpec.load(study_file, overrides)
    if address is not None and address.startswith(("http://", "https://")):
        return _from_outside(spec, address, insecure, data_on_cluster, say)
    checks, data = _check_data(spec)
    checks.append(_check_storage(spec))
    with contextlib.ExitStack() as stack:
        try:
            if address is not None:
                find_head(address)  # also where this process is connected to another
            runtime = stack.enter_context(ray_runtime(address, data_bytes=0 if data is None else data.nbytes))
        except Exception as error:  # of many kinds, where Ray does not start
            return [*checks, *_no_ray(error)]
        if address is not None:
            checks.append(Check("ray", "ok", f"joined the Ray cluster at {runtime.address}"))
        return checks + check_nodes(runtime, _asked(spec), data_bytes=None if data is None else data.nbytes)


def print_checks(console: "Console", checks: Sequence[Check]) -> None:
    from rich.text import Text

    for check in checks:
        width = max(NARROWEST, console.width - MARGIN)
        lines = textwrap.wrap(_sentence(check), width, break_long_words=False, break_on_hyphens=False)
        text = Text(check.verdict.ljust(MARGIN), style=STYLES[check.verdict])
        text.append(("\n" + MARGIN * " ").join(lines), style="default not bold")
        console.print(text, soft_wrap=True)


def _from_outside(
    spec: StudySpec, address: str, insecure: bool, data_on_cluster: bool, say: Callable[[str], None]
) -> list[Check]:
    checks = check_token_file()
    if any(check.verdict == "failed" for check in checks):
        return [*checks, _not_seen("there is no token to show")]
    try:
        jobs = Jobs(address, insecure=insecure)
        jobs.check_version()
        checks.append(Check("ray", "ok", f"{jobs.address} runs Ray {jobs.ray_version()}, and lets us in"))
        with tempfile.TemporaryDirectory(prefix="vaesearch-") as folder:
            write_package(spec, Path(folder), data_on_cluster)
            say(f"{jobs.address}: a short job there looks at the rest")
            try:
                said = jobs.run(_entrypoint(spec), working_dir=Path(folder), timeout_s=JOB_TIMEOUT_S)
            except JobFailed as error:
                said = str(error)
                if error.exit_code == NO_SUCH_COMMAND:
                    said += f"\nvaesearch is not installed there; install vaesearch {version('vaesearch')} on the head"
    except AddressRefused as error:
        raise InputError(str(error)) from None
    except (AccessDenied, ClusterUnreachable, VersionMismatch) as error:
        return [*checks, *_no_ray(error)]
    except (InputError, UploadTooLarge) as error:
        return [*checks, _failed("data", error), _not_seen("the data cannot be sent")]
    last = (said.strip().splitlines() or ["the job there said nothing"])[-1]
    return checks + (_taken_over(said) or [_failed("ray", JobFailed(last)), _not_seen("no doctor ran there")])


def _entrypoint(spec: StudySpec) -> str:
    """A command for the shell of the head, which knows where the results of a study lie that does not say so."""
    asked = storage_elsewhere(spec)
    storage = f'"${{{STORAGE_VARIABLE}:-{DEFAULT_STORAGE}}}"' if asked is None else shlex.quote(asked)
    return f"vaesearch doctor {STUDY_FILE} --json --address auto --storage {storage}"


def _taken_over(said: str) -> list[Check]:
    """The checks that a doctor on the cluster printed, among other things that a job says; none where it did not."""
    document = re.search(r"^\[$.*^\]$", said, re.MULTILINE | re.DOTALL)
    try:
        found = [Check(**entry) for entry in json.loads(document[0])] if document else []
    except (TypeError, ValueError):
        return []
    return [Check(f"cluster.{check.name}", check.verdict, f"there, {check.what}", check.mend) for check in found]


def _asked(spec: StudySpec) -> Asked:
    asked = spec.resources
    return Asked(
        cpus=asked.cpus_per_trial,
        gpus=None if asked.gpus_per_trial == "auto" else asked.gpus_per_trial,
        at_once=None if asked.concurrency == "auto" else asked.concurrency,
        is_growing=asked.autoscaling,
    )


def _check_data(spec: StudySpec) -> tuple[list[Check], Dataset | None]:
    try:
        data = load_data(spec.data_config())
        check_model(spec, data)
        check_batches(spec, data)
    except InputError as error:
        return [_failed("data", error)], None
    rows = len(data.train) + len(data.validation) + len(data.test)
    what = f"{spec.data.source}: {rows:,} rows of {data.input_dim:,} values, {data.nbytes / 2**20:,.1f} MiB"
    return [Check("data", "ok", what)], data


def _check_storage(spec: StudySpec) -> Check:
    try:
        folder = spec.folder.parent
        check_writable(folder)
    except InputError as error:
        return _failed("storage", error)
    return Check("storage", "ok", f"{folder} can be written")


def _no_ray(error: Exception) -> list[Check]:
    return [_failed("ray", error), _not_seen("there is no connection")]


def _not_seen(why: str) -> Check:
    return Check("nodes", "warning", f"not looked at, as {why}: versions, token, placement, GPUs, memory and clocks")


def _failed(name: str, error: Exception) -> Check:
    """Of an error whose text says what would do after a line break or a semicolon."""
    text = str(error) or type(error).__name__
    what, _, mend = text.partition("\n") if "\n" in text else text.rpartition("; ") if "; " in text else (text, "", "")
    return Check(name, "failed", what, " ".join(mend.split()))


def _sentence(check: Check) -> str:
    return f"{check.what}; {check.mend}" if check.mend else check.what
