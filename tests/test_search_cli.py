"""The command line: what is wrong is told in a line or three before anything is written, what is right is on stdout."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from test_search_ledger import epoch_row, trial_row

import search.cli_cluster
import search.fetch
from search import cli
from search.ledger import Ledger
from search.results import write_study_file
from search.spec import StudySpec
from vae.config import InputError

PROVENANCE = {"created_at": datetime(2026, 3, 1, tzinfo=UTC), "data_fingerprint": "f00"}
ALL = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
COMMANDS = sorted(name for name, command in ALL.items() if not command.hidden)
WITHOUT_JSON = {
    "init": "prints a study file",
    "query": "has --format json",
    "logs": "prints what a driver has said",
    "dashboard": "serves a page until it is interrupted",
}
README_SQL = "SELECT activation, min(val_nelbo) FROM trials GROUP BY 1 ORDER BY 2"


class Said(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def vaesearch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., tuple[int, str, str]]
) -> Command:
    """`vaesearch ...` in an empty folder and without Ray: nothing here may get as far as to need it."""

    def no_ray(*args: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    import search.study

    monkeypatch.setattr(search.study, "ray_runtime", no_ray)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RAY_ADDRESS", "VAESEARCH_STORAGE", "VAESEARCH_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    return lambda *arguments: Said(*in_process(*arguments))


@pytest.fixture
def studies(vaesearch: Command) -> Path:
    """The folder `studies`, where the commands look: one study with leaders, and one without a trial yet."""
    for name in ("digits", "fresh"):
        path = Path("studies") / name
        path.mkdir(parents=True)
        write_study_file(path, StudySpec.model_validate({"name": name, "budget": {"trials": 5}}), PROVENANCE)
    ledger = Ledger(Path("studies/digits"))
    figures = {"val_recon": 80.0, "val_kl": 8.0, "active_units": 4, "no_latent_nelbo": 120.0, "epochs": 3}
    ledger.add_epochs([epoch_row(0, epoch, study="digits") for epoch in (1, 2, 3)])
    ledger.end_trial(trial_row(0, study="digits", val_nelbo=90.5, activation="relu", **figures))
    ledger.end_trial(trial_row(1, study="digits", val_nelbo=88.25, **figures))
    ledger.end_trial(trial_row(2, "PRUNED", study="digits", val_nelbo=99.0, activation="tanh", epochs=1))
    ledger.end_trial(trial_row(3, "PRUNED", study="digits", status="diverged", reason="[b]loss[/b] is nan", epochs=1))
    ledger.start_trial(trial_row(4, "RUNNING", study="digits", activation="elu"))
    return Path("studies")


def files_under(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(vaesearch: Command, *arguments: object) -> str:
    """The complaint of a command that must be refused as wrong use, and must leave the disk as it was."""
    before = files_under(Path.cwd())
    said = vaesearch(*arguments)
    assert said.code == 2, said
    assert said.out == ""
    assert 1 <= len(said.err.splitlines()) <= 3, said.err
    assert "Traceback" not in said.err
    assert files_under(Path.cwd()) == before
    return said.err


# ---- wrong use


def array(shape: tuple[int, ...], **place: float) -> np.ndarray:
    values = np.random.default_rng(0).random(shape)
    for value in place.values():
        values[shape[0] // 2, 0] = value
    return values


BAD_DATA: dict[str, tuple[np.ndarray, list[str]]] = {
    "NaN": (array((300, 4), at=np.nan), ["row 150", "NaN"]),
    "infinite": (array((300, 4), at=np.inf), ["row 150", "inf"]),
    "out of range": (array((300, 4)) * 255, ["outside [0, 1]", "data.scale"]),
    "constant": (np.full((300, 4), 0.5), ["constant"]),
    "one column": (array((300, 1)), ["column"]),
    "one value": (np.array(3.0), ["shape"]),
    "too few rows": (array((2, 4)), ["rows"]),
    "fewer rows than a batch": (array((60, 4)), ["batch", "train.batch_size"]),
    "text": (np.array([["a", "b"]] * 300), ["numbers"]),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_are_refused_by_file_and_remedy(what, vaesearch):
    values, words = BAD_DATA[what]
    np.save("rows.npy", values)
    complaint = refused(vaesearch, "run", "--data", "rows.npy", "--trials", 2)
    assert "rows.npy" in complaint
    assert all(word in complaint for word in words), complaint


def test_a_torn_array_is_refused(vaesearch):
    np.save("rows.npy", array((300, 4)))
    Path("rows.npy").write_bytes(Path("rows.npy").read_bytes()[:200])
    assert "rows.npy" in refused(vaesearch, "run", "--data", "rows.npy")


def test_a_batch_that_is_searched_is_held_against_the_rows_too(vaesearch):
    np.save("rows.npy", array((100, 4)))
    complaint = refused(vaesearch, "run", "--data", "rows.npy", "--set", "space.batch_size={low=8, high=90}")
    assert "space.batch_size" in complaint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "none.npy"], ["none.npy", "no such file"]),
        (["--data", "digit"], ["digit", "did you mean digits"]),
        (["--data", "mnist", "--data-dir", "."], ["mnist"]),
        (["none.toml"], ["none.toml", "vaesearch init"]),
        (["--set", "budget.trails=3"], ["budget.trails", "unknown", "trials"]),
        (["--set", "space.dropout={low=0.5, high=0.1}"], ["--set space.dropout", "0.5", "0.1"]),
        (["--set", "space.dropout"], ["--set space.dropout", "KEY=VALUE"]),
        (["--set", "=3"], ["--set", "KEY=VALUE"]),
        (["--set", "seed.x.y=3"], ["seed"]),
        (["--trials", "0"], ["trials", "1"]),
        (["--max-epochs", "2", "--set", "scheduler.grace_epochs=5"], ["scheduler.grace_epochs", "max_epochs"]),
        (["--seed", "-1"], ["seed"]),
        (["--goal", "fun"], ["goal", "best-model"]),
        (["--name", "../x"], ["name", "../x"]),
        (["--concurrency", "many"], ["concurrency", "auto"]),
        (["--gpus-per-trial", "nan"], ["gpus_per_trial"]),
        (["--extend", "3"], ["digits", "extend"]),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_key_and_remedy(arguments, words, vaesearch):
    complaint = refused(vaesearch, "run", *arguments)
    assert all(word in complaint for word in words), complaint


@pytest.mark.parametrize("text", ["[budget]\ntrails = 3\n", "[budget\n", "[space]\nactivation = []\n"])
def test_a_bad_study_file_is_refused_by_its_name(text, vaesearch):
    Path("study.toml").write_text(text)
    assert "study.toml" in refused(vaesearch, "run", "study.toml")


@pytest.mark.parametrize("storage", ["file", "file/below", "/proc/none"])
def test_storage_that_cannot_be_written_is_refused_by_its_name(storage, vaesearch):
    Path("file").write_text("in the way")
    complaint = refused(vaesearch, "run", "--storage", storage)
    assert storage in complaint
    assert "--storage" in complaint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "digts"], ["digts", "digits", "fresh"]),
        (["query", "SELEC 1"], ["SELEC"]),
        (["query", "DROP VIEW trials"], ["SELECT"]),
        (["query", "SELECT 1", "--format", "xlsx"], ["xlsx", "csv"]),
        (["query", "SELECT 1", "-o", "none/x.csv", "--format", "csv"], ["none/x.csv"]),
        (["query", "SELECT 1", "--storage", "none"], ["none", "--storage"]),
        (["export", "digts"], ["digts"]),
        (["list", "--storage", "none"], ["none"]),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(arguments, words, vaesearch, studies):
    before = files_under(Path.cwd())
    said = vaesearch(*arguments)
    assert (said.code, said.out) == (2, "")
    assert 1 <= len(said.err.splitlines()) <= 4  # duckdb shows the place in two lines
    assert all(word in said.err for word in words), said.err
    assert files_under(Path.cwd()) == before


@pytest.mark.parametrize("arguments", [["run", "--no-such-flag"], ["show"], ["nonsense"], ["run", "--trials", "many"]])
def test_an_unknown_flag_command_or_kind_exits_with_2_and_leaves_stdout_alone(arguments, vaesearch):
    said = vaesearch(*arguments)
    assert (said.code, said.out) == (2, "")
    assert "help" in said.err or "-h" in said.err


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_debug_shows_the_traceback_wherever_it_stands(place, vaesearch, monkeypatch):
    arguments = ["show", "nothing", "--json"]
    monkeypatch.setattr(sys, "argv", ["vaesearch", *arguments[:place], "--debug", *arguments[place:]])
    with pytest.raises(InputError):  # out of `main`, so that Python prints the traceback
        cli.main()


def test_an_unforeseen_error_is_one_line_and_exit_1_unless_debugging(vaesearch, studies, monkeypatch):
    import search.results

    def fail(path: object) -> None:
        raise RuntimeError("the roof is on fire")

    monkeypatch.setattr(search.results, "open_study", fail)
    said = vaesearch("show", "digits")
    assert (said.code, said.out, said.err) == (1, "", "vaesearch: the roof is on fire\n")


# ---- right use


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(command, flag, vaesearch):
    said = vaesearch(command, flag)
    assert (said.code, said.err) == (0, "")
    assert command in said.out
    assert "Usage" in said.out


def test_help_names_every_command_and_no_arguments_are_answered_with_it(vaesearch):
    said = vaesearch("--help")
    assert (said.code, said.err) == (0, "")
    assert all(command in said.out for command in COMMANDS)
    nothing = vaesearch()
    assert all(command in nothing.out + nothing.err for command in COMMANDS)


def test_the_version_is_that_of_the_installed_package(vaesearch):
    assert vaesearch("--version") == Said(0, version("vaesearch") + "\n", "")


def test_init_prints_a_study_file_that_is_the_defaults(vaesearch, tmp_path):
    said = vaesearch("init")
    assert (said.code, said.err) == (0, "")
    (tmp_path / "study.toml").write_text(said.out)
    assert StudySpec.load(tmp_path / "study.toml") == StudySpec()


def test_init_for_a_kind_of_data_says_what_it_is_for(vaesearch):
    said = vaesearch("init", "--for", "counts")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("# For tables of counts")
    assert 'likelihood = "negative_binomial"' in said.out
    assert vaesearch("init", "--for", "sounds").err == (
        "vaesearch: --for sounds: known are images, grey-images, tables, counts\n"
    )


def test_list_has_a_line_a_study_with_its_progress_and_best(vaesearch, studies):
    said = vaesearch("list")
    assert (said.code, said.err) == (0, "")
    digits, fresh = (next(line for line in said.out.splitlines() if name in line) for name in ("digits ", "fresh"))
    assert "4/5" in digits
    assert "88.25" in digits
    assert "0/5" in fresh


def test_show_tells_the_leaders_the_activations_and_what_to_do_next(vaesearch, studies):
    said = vaesearch("show", "digits")
    assert (said.code, said.err) == (0, "")
    assert "4 of 5 trials" in said.out
    assert "88.25" in said.out
    assert all(name in said.out for name in ("relu", "silu", "tanh"))
    assert "120.00" in said.out  # what the best must beat
    assert "min(val_nelbo) FROM trials WHERE study = 'digits' AND state = 'COMPLETE' GROUP BY 1" in said.out
    assert "vaesearch export digits" in said.out


def test_show_trials_has_a_line_a_trial(vaesearch, studies):
    said = vaesearch("show", "digits", "--trials")
    assert said.code == 0
    for state in ("COMPLETE", "PRUNED", "RUNNING", "diverged"):
        assert state in said.out
    for number in range(5):
        assert re.search(rf"^\s*{number}\s+(COMPLETE|PRUNED|RUNNING)", said.out, re.MULTILINE)


def test_a_study_without_trials_is_shown_too(vaesearch, studies):
    said = vaesearch("show", "fresh")
    assert (said.code, said.err) == (0, "")
    assert "0 of 5 trials" in said.out


def test_the_storage_folder_may_come_from_the_environment(vaesearch, studies, monkeypatch):
    studies.rename("elsewhere")
    assert vaesearch("show", "digits").code == 2
    monkeypatch.setenv("VAESEARCH_STORAGE", "elsewhere")
    said = vaesearch("show", "digits")
    assert said.code == 0
    assert "--storage elsewhere" in said.out  # in the commands to type next
    assert vaesearch("show", "digits", "--storage", "none").code == 2  # a flag wins


def test_show_json_is_one_document_with_the_leaders_and_the_counts(vaesearch, studies):
    said = vaesearch("show", "digits", "--json")
    assert (said.code, said.err) == (0, "")
    document = json.loads(said.out)
    assert document["states"] == {"COMPLETE": 2, "PRUNED": 2, "RUNNING": 1}
    assert document["statuses"] == {"ok": 3, "diverged": 1}
    assert [row["trial"] for row in document["leaders"]] == [1, 0]
    assert document["best"]["val_nelbo"] == 88.25
    assert document["best"]["hidden_dims"] == [8, 8]
    assert document["is_complete"] is False
    assert document["epochs_saved"] == 2
    assert datetime.fromisoformat(document["best"]["suggested_at"]).tzinfo is not None


def test_list_json_is_one_document_with_every_study(vaesearch, studies):
    said = vaesearch("list", "--json")
    assert (said.code, said.err) == (0, "")
    assert [(study["name"], study["trials"]) for study in json.loads(said.out)] == [("digits", 5), ("fresh", 5)]


def test_list_json_of_nothing_is_an_empty_document(vaesearch):
    assert vaesearch("list", "--json") == Said(0, "[]\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_json_but_those_with_a_reason_not_to(command):
    options = {option for parameter in ALL[command].params for option in parameter.opts}
    assert ("--json" in options) == (command not in WITHOUT_JSON)


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "digits"], ["compare", "digits"], ["report", "digits", "--light"], ["data"], ["env"]],
)
def test_json_is_the_one_thing_on_stdout(arguments, vaesearch, studies):
    said = vaesearch(*arguments, "--json")
    assert (said.code, said.err) == (0, "")
    assert isinstance(json.loads(said.out), dict | list)
    assert said.out.endswith("\n")


@pytest.mark.parametrize("command", ["show none", "compare none", "report none", "export none", "replay none 0"])
def test_errors_with_json_are_told_as_without(command, vaesearch, studies):
    complaint = refused(vaesearch, *command.split(), "--json")
    assert "studies in studies: digits, fresh" in complaint
    assert complaint == refused(vaesearch, *command.split())


def test_fetch_json_says_where_the_copy_is(vaesearch, monkeypatch):
    monkeypatch.setattr(search.cli_cluster, "_jobs", lambda address, insecure: None)
    monkeypatch.setattr(search.fetch, "fetch", lambda jobs, study, to, say: to / study)
    assert json.loads(vaesearch("fetch", "digits", "--json").out) == {"id": "digits", "path": "studies/digits"}
    assert vaesearch("fetch", "digits") == Said(0, "studies/digits\n", "")


def test_query_answers_in_every_format(vaesearch, studies):
    wanted = [("silu", 88.25), ("relu", 90.5), ("tanh", 99.0), ("elu", None)]
    said = vaesearch("query", README_SQL)
    assert said.code == 0
    assert [name in said.out for name, _ in wanted] == [True] * 4
    rows = json.loads(vaesearch("query", README_SQL, "--format", "json").out)
    assert [tuple(row.values()) for row in rows] == wanted
    lines = vaesearch("query", README_SQL, "--format", "csv").out.splitlines()
    assert lines[1:] == ['"silu",88.25', '"relu",90.5', '"tanh",99', '"elu",']
    said = vaesearch("query", README_SQL, "--format", "parquet", "-o", "best.parquet")
    assert (said.code, said.out) == (0, "")
    assert [tuple(row.values()) for row in pq.read_table("best.parquet").to_pylist()] == wanted


def test_compare_tells_the_verdict_first_or_that_there_is_none_and_what_would_make_one(vaesearch, studies):
    said = vaesearch("compare", "digits")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("no verdict: silu leads so far, for digits")
    assert all(name in said.out for name in ("relu", "tanh", "elu"))
    assert "4 of 5 trials ended" in said.out
    assert "  vaesearch resume digits\n" in said.out
    assert vaesearch("compare", "fresh").out.startswith("no verdict: no trial has ended yet")


def test_compare_json_is_one_document(vaesearch, studies):
    said = vaesearch("compare", "digits", "--json")
    assert (said.code, said.err) == (0, "")
    document = json.loads(said.out)
    assert (document["study"], document["verdict"], document["importances"]) == ("digits", None, None)
    assert [arm["activation"] for arm in document["arms"]][:2] == ["silu", "relu"]
    assert document["sentence"].startswith("no verdict: silu leads so far")


def test_compare_ranks_the_activations_of_several_studies(vaesearch, studies):
    write_study_file(
        studies / "fresh", StudySpec.model_validate({"name": "fresh", "budget": {"trials": 2}}), PROVENANCE
    )
    ledger = Ledger(studies / "fresh")
    ledger.end_trial(trial_row(0, study="fresh", val_nelbo=90.5, activation="silu"))
    ledger.end_trial(trial_row(1, study="fresh", val_nelbo=88.25, activation="relu"))
    ledger.flush()
    said = vaesearch("compare", "digits", "fresh")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("no detectable difference: ")
    assert "2 data sets are few" in said.out
    assert "digits and fresh are of the same data" in said.out
    document = json.loads(vaesearch("compare", "digits", "fresh", "--json").out)
    assert document["mean_ranks"] == {"silu": 1.5, "relu": 1.5}
    assert [comparison["study"] for comparison in document["comparisons"]] == ["digits", "fresh"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], ["none", "digits, fresh"]),
        (["digits", "--a", "relu"], ["--a and --b"]),
        (["digits", "fresh", "--a", "relu", "--b", "silu"], ["one study"]),
        (["digits", "--a", "relu", "--b", "silu"], ["relu has no finals"]),
        (["digits", "--a", "relu", "--b", "glu"], ["glu is not among", "relu"]),
        (["digits", "digits"], ["digits stands twice"]),
        (["digits", "fresh"], ["fewer than two"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_compared_is_refused_with_why(arguments, words, vaesearch, studies):
    complaint = refused(vaesearch, "compare", *arguments)
    assert all(word in complaint for word in words)


def test_data_names_every_source_and_how_to_get_what_is_missing(vaesearch, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = vaesearch("data")
    assert (said.code, said.err) == (0, "")
    assert all(name in said.out for name in ("digits", "mnist", "fashion-mnist"))
    sources = {source["name"]: source for source in json.loads(vaesearch("data", "--json").out)}
    assert sources["digits"]["found"] is True
    assert sources["mnist"]["how_to_get"]


def test_a_refused_run_of_a_stored_study_tells_the_difference(vaesearch, studies):
    from vae.data import load_data

    spec = StudySpec.model_validate({"name": "digits", "budget": {"trials": 5}})
    fingerprint = load_data(spec.data_config()).fingerprint
    write_study_file(studies / "digits", spec, PROVENANCE | {"data_fingerprint": fingerprint, "trials_at_first": 5})
    complaint = refused(vaesearch, "run", "--trials", 5, "--set", "train.beta=2.0", "--seed", 1)
    assert "train.beta: 1.0 -> 2.0" in complaint
    assert "seed: 0 -> 1" in complaint
    assert "--name" in complaint


def test_a_run_on_other_data_than_the_stored_study_is_refused(vaesearch, studies):
    assert "other data" in refused(vaesearch, "run", "--trials", 5)


# ---- completion


def completed(vaesearch: Command, monkeypatch: pytest.MonkeyPatch, line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    typed = line.split(" ")
    with monkeypatch.context() as patch:
        patch.setenv("_VAESEARCH_COMPLETE", "complete_bash")
        patch.setenv("COMP_WORDS", line)
        patch.setenv("COMP_CWORD", str(len(typed) - 1))
        said = vaesearch()
    assert (said.code, said.err) == (0, "")
    return said.out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vaesearch sh", ["show"]),
        ("vaesearch show ", ["digits", "fresh"]),
        ("vaesearch show d", ["digits"]),
        ("vaesearch resume f", ["fresh"]),
        ("vaesearch export x", []),
        ("vaesearch replay d", ["digits"]),
        ("vaesearch sample d", ["digits"]),
        ("vaesearch compare digits f", ["fresh"]),
        ("vaesearch compare digits --a sil", ["silu"]),
        ("vaesearch compare digits --a silu --b leaky", ["leaky_relu"]),
        ("vaesearch show --storage elsewhere ", ["other"]),
        ("vaesearch show --storage s3://bucket/studies ", []),
        ("vaesearch show --storage none ", []),
        ("vaesearch status d", []),  # of a cluster
    ],
)
def test_the_shell_completes_commands_studies_and_activations(line, offered, vaesearch, studies, monkeypatch):
    Path("elsewhere/other").mkdir(parents=True)
    Path("elsewhere/other/study.toml").touch()
    assert completed(vaesearch, monkeypatch, line) == offered


def test_the_shell_completes_from_the_storage_of_the_environment(vaesearch, studies, monkeypatch):
    studies.rename("elsewhere")
    monkeypatch.setenv("VAESEARCH_STORAGE", "elsewhere")
    assert completed(vaesearch, monkeypatch, "vaesearch show ") == ["digits", "fresh"]


def test_bash_completes_with_the_script_that_the_command_prints(studies):
    command = Path(sys.executable).with_name("vaesearch")
    bash = shutil.which("bash")
    if not command.exists() or bash is None:
        pytest.skip("the package is not installed beside this Python, or there is no bash")
    script = """
        eval "$(_VAESEARCH_COMPLETE=source_bash vaesearch)"
        COMP_WORDS=(vaesearch show d) COMP_CWORD=2
        _vaesearch_completion vaesearch
        echo "${COMPREPLY[@]}"
        complete -p vaesearch
    """
    environment = {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["digits", "complete -o default -F _vaesearch_completion vaesearch"]
    assert done.stderr == ""


# ---- light

IN_A_PROCESS = """
import sys
sys.argv = ["vaesearch", *sys.argv[1:]]
from search.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["init"],
        ["list"],
        ["show", "digits"],
        ["compare", "digits"],
        ["query", README_SQL],
    ],
    ids=" ".join,
)
def test_what_trains_nothing_loads_neither_torch_nor_ray_nor_optuna(arguments, studies):
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout
    modules = set(done.stderr.split())
    assert "search.cli" in modules
    assert not modules & {"torch", "ray", "optuna", "sklearn"}


def test_completion_loads_nothing_heavy(studies):
    asked = {"_VAESEARCH_COMPLETE": "complete_bash", "COMP_WORDS": "vaesearch show d", "COMP_CWORD": "2"}
    command = [sys.executable, "-c", IN_A_PROCESS]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)
    assert done.stdout == "digits\n"
    heavy = {"torch", "ray", "optuna", "sklearn", "numpy", "pyarrow", "duckdb", "rich.console"}
    assert not set(done.stderr.split()) & heavy


def test_the_installed_command_runs_and_exits_with_its_status(studies: Any) -> None:
    command = Path(sys.executable).with_name("vaesearch")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([command, "show", "none"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    debug = subprocess.run([command, "show", "none", "--debug"], capture_output=True, text=True)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
